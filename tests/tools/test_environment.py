"""Tools and launch scripts as typed without an activated environment."""

import os
import shutil
import subprocess
import sys

import pytest

from helpers.paths import REPO
from helpers.tools import DEMO

TOOLS = sorted(
    str(path.relative_to(REPO / 'tools')) for path in (REPO / 'tools').rglob('*.py') if '__main__' in path.read_text()
)


@pytest.fixture
def checkout(tmp_path):
    """A folder with the tools, as a checkout has them, and nothing else."""
    shutil.copytree(REPO / 'tools', tmp_path / 'tools', ignore=shutil.ignore_patterns('images', '__pycache__'))
    return tmp_path


def stand_in(folder, name='python', body='exit 1'):
    """An executable; one that fails every question has no torch."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(f'#!/bin/bash\n{body}\n')
    (folder / name).chmod(0o755)
    return folder / name


def bare(*command, **env):
    """Run with a PATH that has no Python but what ``env`` brings."""
    env.setdefault('PATH', '/usr/bin:/bin')
    keep = {name: value for name, value in os.environ.items() if name not in ('PYTHON', 'PYTHONPATH', 'VIRTUAL_ENV')}
    return subprocess.run([*map(str, command)], env={**keep, **env}, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize('tool', TOOLS)
def test_python_without_the_libraries(tool, checkout):
    """``-S`` hides what is installed: one sentence that names what is missing and how to get it, and exit 2."""
    done = bare(sys.executable, '-S', checkout / 'tools' / tool, '--help')
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert 'has no torch and no mmengine and no cv2 and no bnet_mm' in done.stderr
    assert f'bash {checkout}/tools/install.sh' in done.stderr
    stand_in(checkout / '.venv' / 'bin')
    done = bare(sys.executable, '-S', checkout / 'tools' / tool, '--help')
    assert done.returncode == 2 and f'. {checkout}/.venv/bin/activate' in done.stderr
    assert f'{checkout}/.venv/bin/python {checkout}/tools/{tool}' in done.stderr


CHECKPOINT = 'https://host/a.pth'  # which no script looks for
LAUNCH = {
    'dist_train.sh': [DEMO, '2'], 'dist_test.sh': [DEMO, CHECKPOINT, '2'], 'slurm_train.sh': ['p', 'j', DEMO, '2'],
    'slurm_test.sh': ['p', 'j', DEMO, CHECKPOINT, '2'],
}  # fmt: skip


@pytest.mark.parametrize('script', LAUNCH)
def test_which_python_launches(script, checkout, tmp_path):
    """$PYTHON, else the active one, else the checkout's; without torch anywhere one sentence and no process."""
    srun = stand_in(tmp_path / 'srun', 'srun', 'echo srun "$@"')
    launch = [checkout / 'tools' / script, *(REPO / a if a == DEMO else a for a in LAUNCH[script])]
    has_torch = '[ "$1" = -c ] && exit 0; echo runs "$0"'
    path = f'{srun.parent}:/usr/bin:/bin'
    none = stand_in(tmp_path / 'none').parent
    done = bare(*launch, PATH=f'{none}:{path}')
    assert done.returncode == 2 and 'error: no Python with torch' in done.stderr and not done.stdout
    own = stand_in(checkout / '.venv' / 'bin', body=has_torch)
    done = bare(*launch, PATH=f'{none}:{path}')
    assert str(own) in done.stdout and f'using {own}' in done.stderr
    active = stand_in(tmp_path / 'active', body=has_torch)
    done = bare(*launch, PATH=f'{active.parent}:{path}')
    assert ('runs' in done.stdout or 'srun' in done.stdout) and str(own) not in done.stdout and not done.stderr
    chosen = stand_in(tmp_path / 'chosen', 'python3.11', has_torch)
    assert str(chosen) in bare(*launch, PATH=f'{active.parent}:{path}', PYTHON=chosen).stdout
    done = bare(*launch, PATH=f'{active.parent}:{path}', PYTHON=none / 'python')
    assert done.returncode == 2 and f'error: PYTHON={none / "python"} has no torch' in done.stderr


@pytest.mark.parametrize('script', LAUNCH)
def test_missing_config_starts_nothing(script, checkout, tmp_path):
    srun = stand_in(tmp_path / 'bin', 'srun', 'echo started')
    stand_in(tmp_path / 'bin', body='[ "$1" = -c ] && exit 0; echo started')
    for given, typed, what in ((DEMO, 'nope.py', 'config'), (CHECKPOINT, 'nope.pth', 'checkpoint')):
        if given not in LAUNCH[script]:
            continue
        arguments = [typed if a == given else REPO / a if a == DEMO else a for a in LAUNCH[script]]
        done = bare(checkout / 'tools' / script, *arguments, PATH=f'{srun.parent}:/usr/bin:/bin')
        assert done.returncode == 2 and done.stderr == f'error: {what} {typed} does not exist\n' and not done.stdout
    (checkout / 'configs').mkdir()
    (checkout / 'configs' / 'ours.py').touch()
    for config, there in (('bnet_mm::ours', True), ('bnet_mm::ours.py', True), ('bnet_mm::our', False), ('a::b', True)):
        arguments = [config if argument == DEMO else argument for argument in LAUNCH[script]]
        done = bare(checkout / 'tools' / script, *arguments, PATH=f'{srun.parent}:/usr/bin:/bin')
        assert ('started' in done.stdout) == there and (done.returncode == 0) == there, config
