"""bnet_mm.host.compat acts where a library is broken, and only there: stand-ins for both states, in fresh processes."""

import os
import subprocess
import sys

import pytest
import torch

from helpers.paths import REPO

# A torchvision whose Python part needs an operator of its compiled part to be there, as the real one does.
BROKEN = """
import torch
try:
    torch.ops.torchvision.nms
except AttributeError as error:
    raise RuntimeError('operator torchvision::nms does not exist') from error
__version__ = '9.9'
"""
PRELUDE = 'import sys, importlib\nimport bnet_mm.host.compat as compat\n'
PLAIN = 'import sys, torch\ntorch.version.cuda = None\nimport bnet_mm\n'


def run(code, folder, prelude=PRELUDE):
    env = dict(os.environ, PYTHONPATH=f'{folder}{os.pathsep}{REPO}', PYTHONWARNINGS='ignore')
    return subprocess.run([sys.executable, '-c', prelude + code], env=env, capture_output=True, text=True, timeout=120)


def package(folder, name, text=''):
    path = folder.joinpath(*name.split('.'))
    for parent in [path, *path.parents]:
        if parent == folder:
            break
        parent.mkdir(parents=True, exist_ok=True)
        (parent / '__init__.py').touch()
    (path / '__init__.py').write_text(text)


@pytest.fixture
def healthy(tmp_path):
    package(tmp_path, 'torchvision', "__version__ = '9.9'\n")
    package(tmp_path, 'mmaction.models.localizers.drn')
    return tmp_path


def test_nothing_is_done_on_a_healthy_installation(healthy):
    code = """
assert compat.MENDED == [], compat.MENDED
import torchvision
assert torchvision.__version__ == '9.9' and not hasattr(compat.mend_torchvision, 'library')
assert not any(name.startswith('mmaction') for name in sys.modules)
"""
    done = run(code, healthy)
    assert done.returncode == 0, done.stderr


def test_nothing_is_done_where_nothing_is_installed(tmp_path):
    blocked = 'import importlib.util as u\nimport sys\nreal = u.find_spec\n'
    blocked += "u.find_spec = lambda name, *a: None if name in ('torchvision', 'mmaction') else real(name, *a)\n"
    env = dict(os.environ, PYTHONPATH=REPO, PYTHONWARNINGS='ignore')
    code = blocked + 'import bnet_mm.host.compat as c\nassert c.MENDED == [] and "torchvision" not in sys.modules'
    done = subprocess.run([sys.executable, '-c', code], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_a_torchvision_without_its_compiled_part_can_be_imported(healthy):
    package(healthy, 'torchvision', BROKEN)
    plain = subprocess.run(
        [sys.executable, '-c', 'import torchvision'], env=dict(os.environ, PYTHONPATH=str(healthy)), capture_output=True
    )
    assert plain.returncode != 0 and b'torchvision::nms' in plain.stderr
    code = """
import torch
assert compat.MENDED == ['mend_torchvision'], compat.MENDED
import torchvision
assert torchvision.__version__ == '9.9'
try:
    torch.ops.torchvision.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
except NotImplementedError as error:
    print('calling it still raises')
"""
    done = run(code, healthy)
    assert done.returncode == 0 and 'calling it still raises' in done.stdout, done.stderr


def test_another_error_of_torchvision_is_not_hidden(healthy):
    package(healthy, 'torchvision', "raise RuntimeError('something else')\n")
    done = run('', healthy)
    assert done.returncode != 0 and 'something else' in done.stderr


def test_the_package_that_mmactions_wheel_lacks(tmp_path):
    package(tmp_path, 'torchvision', "__version__ = '9.9'\n")
    package(tmp_path, 'mmaction.models.localizers', 'from .drn.drn import DRN\n')
    code = """
assert compat.MENDED == ['mend_mmaction'], compat.MENDED
from mmaction.models.localizers import DRN
try:
    DRN()
except ImportError as error:
    print(error)
"""
    done = run(code, tmp_path)
    assert done.returncode == 0 and "DRN is missing in mmaction2's wheel" in done.stdout, done.stderr


def dist_info(folder, needs):
    info = folder / 'torchvision-9.9.dist-info'
    info.mkdir()
    (info / 'METADATA').write_text(f'Metadata-Version: 2.1\nName: torchvision\nVersion: 9.9\n{needs}')


@pytest.mark.parametrize('version, needs', [
    ('9.9+cu130', ''), ('9.9', 'Requires-Dist: torch (==1.0.0)\n'), ('9.9+cpu', 'Requires-Dist: torch==1.0.0\n'),
])  # fmt: skip
def test_plain_import_mends_a_torchvision_of_another_torch(tmp_path, version, needs):
    """With a torch for CPUs, and a torchvision that says of itself that it is for another one."""
    package(tmp_path, 'torchvision', BROKEN)
    (tmp_path / 'torchvision' / 'version.py').write_text(f"__version__ = '{version}'\n")
    dist_info(tmp_path, needs)
    done = run('import torchvision; print(torchvision.__version__)', tmp_path, PLAIN)
    assert done.returncode == 0 and done.stdout == '9.9\n' and not done.stderr, done.stderr


@pytest.mark.parametrize('version', ['9.9', '9.9+cpu'])
def test_plain_import_leaves_a_torchvision_that_fits(tmp_path, version):
    """It is not even imported; nor is one of which nothing is known."""
    package(tmp_path, 'torchvision', "raise AssertionError('imported')\n")
    (tmp_path / 'torchvision' / 'version.py').write_text(f"__version__ = '{version}'\n")
    assert run('', tmp_path, PLAIN).returncode == 0
    dist_info(tmp_path, f'Requires-Dist: torch (=={torch.__version__.split("+")[0]})\n')
    done = run("assert 'bnet_mm.host.compat' not in sys.modules", tmp_path, PLAIN)
    assert done.returncode == 0, done.stderr


def test_plain_import_warns_where_it_cannot_mend(tmp_path):
    package(tmp_path, 'torchvision', "raise RuntimeError('something else')\n")
    dist_info(tmp_path, 'Requires-Dist: torch (==1.0.0)\n')
    code = 'import sys, warnings\nwith warnings.catch_warnings(record=True) as caught:\n'
    code += "    warnings.simplefilter('always')\n    import bnet_mm\n"
    done = run("print(*[c.message for c in caught if 'bnet_mm' in str(c.message)], sep='\\n')", tmp_path, code)
    assert len(done.stdout.splitlines()) == 1, done.stderr
    assert 'bnet_mm cannot install bnet_mm.host.compat' in done.stdout and 'something else' in done.stdout
