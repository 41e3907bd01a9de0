"""tools/install.sh, with stand-ins for Python, pip and mmcv: what it does once, and what it refuses."""

import shutil

import pytest

from helpers.paths import REPO
from helpers.tools import run

# Each call is written to `calls`. mmcv works once it is built; a wheel does if its name says so.
PYTHON = r"""#!/bin/bash
echo "$*" >>calls
case "$*" in
    *version_info*) echo 3.11 ;;
    '-m venv '*) mkdir -p .venv/bin; cp "$0" .venv/bin/python
                 printf '#!/bin/bash\nexit 1\n' >.venv/bin/mim; chmod +x .venv/bin/mim ;;
    *torch.__version__*) echo 9.9 ;;
    *'import mmcv.ops'*) [ -f mmcv_works ] ;;
    *'pip cache list'*) cat cached 2>/dev/null ;;
    *'pip '*/packages.txt) [ ! -f no_network ] || exit 1; cat .venv/packages.txt >>calls ;;
    *'pip '*install*/mmcv.txt) "$CXX" -c -std=c++17 >>calls; touch mmcv_works ;;
    *'pip '*install*good.whl) touch mmcv_works ;;
esac
"""


@pytest.fixture
def copy(tmp_path):
    """What the script reads; in a folder whose name has a space."""
    root = tmp_path / 'a checkout'
    for name in ('tools/install.sh', 'requirements/py311.txt', 'setup.py'):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPO / name, root / name)
    shutil.copytree(REPO / 'bnet_mm' / 'ops' / 'csrc', root / 'bnet_mm' / 'ops' / 'csrc')
    stand_in(root / 'python', PYTHON)
    stand_in(root / 'g++', '#!/bin/sh\necho compiling "$@"\n')
    return root


def stand_in(path, text):
    path.write_text(text)
    path.chmod(0o755)


def install(root, **environment):
    """The finished process, and the calls of Python that it made."""
    (root / 'calls').write_text('')
    environment = dict(CXX=str(root / 'g++')) | environment
    done = run(root / 'tools' / 'install.sh', PYTHON=str(root / 'python'), **environment)
    return done, (root / 'calls').read_text()


def test_once_and_then_nothing(copy):
    done, calls = install(copy)
    assert done.returncode == 0, done.stderr
    stages = [line.split(': ')[0] for line in done.stdout.splitlines() if 'min remain' in line]
    assert stages == ['[install] packages', '[install] mmcv', '[install] bnet_mm']
    assert '--require-hashes' in calls and '\ntorch==' in calls and '\nmmcv==' not in calls
    assert '--no-build-isolation --force-reinstall --require-hashes -r .venv/mmcv.txt' in calls
    assert 'compiling -c -std=c++20\n' in calls  # whatever mmcv's build script says
    done, calls = install(copy)
    assert done.returncode == 0 and not done.stdout and '-m pip' not in calls


def test_resumed_after_a_failure(copy):
    """What is done is skipped: here the environment, then the packages, then nothing but the kernels."""
    (copy / 'no_network').touch()
    done, calls = install(copy)
    assert done.returncode == 1 and 'pip install --no-deps --require-hashes' in done.stderr.splitlines()[-1]
    (copy / 'no_network').unlink()
    done, calls = install(copy, CXX='no-such-compiler')
    assert done.returncode == 2 and '-m venv' not in calls
    assert 'no C++ compiler to build it' in done.stderr.splitlines()[-1]
    done, calls = install(copy)
    assert done.returncode == 0 and 'packages.txt' not in calls and 'mmcv.txt' in calls
    (copy / 'setup.py').write_text('another')
    done, calls = install(copy)
    assert done.returncode == 0 and 'mmcv.' not in calls and '-e .' in calls


def test_a_wheel_from_pips_cache(copy):
    (copy / 'cached').write_text('/cache/mmcv good.whl\n')
    done, calls = install(copy)
    assert done.returncode == 0 and 'the one that pip has in its cache, /cache/mmcv good.whl' in done.stdout
    assert 'mmcv.txt' not in calls and '--force-reinstall /cache/mmcv good.whl' in calls


def test_a_cached_wheel_of_another_torch(copy):
    (copy / 'cached').write_text('/cache/mmcv-bad.whl\n')
    done, calls = install(copy)
    assert done.returncode == 0 and 'mmcv: it does not work with torch 9.9, so it is not used' in done.stdout
    assert '--no-cache-dir --require-hashes -r .venv/mmcv.txt' in calls


def test_a_named_wheel(copy):
    done, calls = install(copy, MMCV_WHEEL=str(copy / 'nope.whl'))
    assert done.returncode == 2 and 'pip' not in calls
    assert done.stderr == f'error: MMCV_WHEEL={copy}/nope.whl is no file\n'
    for name in ('bad.whl', 'good.whl'):
        (copy / name).write_text(name)
    done, calls = install(copy, MMCV_WHEEL=str(copy / 'bad.whl'))
    assert done.returncode == 2 and 'bad.whl does not work with torch 9.9' in done.stderr
    done, calls = install(copy, MMCV_WHEEL=str(copy / 'good.whl'))
    assert done.returncode == 0 and 'mmcv.txt' not in calls
    done, calls = install(copy)
    assert done.returncode == 0 and '-m pip' not in calls


@pytest.mark.parametrize('python, message', [
    ('#!/bin/sh\necho 3.9\n', 'is Python 3.9, and the locks are for 3.10 to 3.13'),
    ('#!/bin/sh\nexit 1\n', 'does not run: install Python 3.11'),
    ('#!/bin/sh\ncase "$2" in *version*) echo 3.11;; *) exit 1;; esac\n', 'lacks the venv module'),
])  # fmt: skip
def test_installer_names_what_is_wrong(copy, python, message):
    stand_in(copy / 'python', python)
    done, _ = install(copy)
    assert done.returncode == 2 and message in done.stderr.splitlines()[-1]
    assert not (copy / '.venv').exists()


def test_an_environment_of_another_python(copy):
    assert install(copy)[0].returncode == 0
    stand_in(copy / '.venv' / 'bin' / 'python', '#!/bin/sh\necho 3.12\n')
    done, _ = install(copy)
    assert done.returncode == 2 and done.stderr.startswith('error: .venv has Python 3.12, and ')
    assert done.stderr.endswith('is Python 3.11: remove .venv first\n')


def test_another_lock_compiles_nothing_again(copy):
    """Where torch and mmcv are the same."""
    assert install(copy)[0].returncode == 0
    with open(copy / 'requirements' / 'py311.txt', 'a') as lock:
        lock.write('another==1.0 --hash=sha256:0\n')
    done, calls = install(copy)
    assert done.returncode == 0 and 'packages.txt' in calls and '\nanother==1.0' in calls
    assert 'mmcv.ops' not in calls and '-e .' not in calls
