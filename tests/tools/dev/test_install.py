"""tools/dev/install.sh says what is wrong."""

import shutil

import pytest

from helpers.paths import REPO
from helpers.tools import run


@pytest.mark.parametrize('python, message', [
    ('#!/bin/sh\necho 3.9\n', 'constraints.txt is for Python 3.11'),
    ('#!/bin/sh\nexit 1\n', 'does not run'),
])  # fmt: skip
def test_installer_names_what_is_wrong(tmp_path, python, message):
    """In an empty copy, with a stand-in for the interpreter."""
    (tmp_path / 'tools' / 'dev').mkdir(parents=True)
    for name in ('tools/dev/install.sh', 'constraints.txt', 'setup.py'):
        shutil.copy(REPO / name, tmp_path / name)
    shutil.copytree(REPO / 'bnet_mm' / 'ops' / 'csrc', tmp_path / 'bnet_mm' / 'ops' / 'csrc')
    (tmp_path / 'python').write_text(python)
    (tmp_path / 'python').chmod(0o755)
    done = run(tmp_path / 'tools' / 'dev' / 'install.sh', PYTHON=str(tmp_path / 'python'))
    assert done.returncode != 0 and message in done.stderr.splitlines()[-1]
    assert not (tmp_path / '.venv').exists()
