"""bnet_mm.host.compat acts where a library is broken, and only there: stand-ins for both states, in fresh processes."""

import os
import subprocess
import sys

import pytest

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


def run(code, folder):
    env = dict(os.environ, PYTHONPATH=f'{folder}{os.pathsep}{REPO}', PYTHONWARNINGS='ignore')
    return subprocess.run([sys.executable, '-c', PRELUDE + code], env=env, capture_output=True, text=True, timeout=120)


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
