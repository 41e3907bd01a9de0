"""tools/dev/lock.py: the locks are what requirements/dev.in asks for, and what is not is named."""

import subprocess

import pytest

import lock
from bnet_mm.cli import UserError
from helpers.tools import run


def test_locks_are_what_the_input_asks_for():
    assert [lock.differences(python) for python in lock.PYTHONS] == [[]] * len(lock.PYTHONS)


def test_no_lock_names_a_registry():
    for python in lock.PYTHONS:
        text = lock.lock_of(python).read_text()
        assert '://' not in text and '--index' not in text and text.count('--hash=sha256:') > 1000


@pytest.fixture
def copies(tmp_path, monkeypatch):
    """The input and its locks, to be changed."""
    for path in (lock.INPUT, *map(lock.lock_of, lock.PYTHONS)):
        (tmp_path / path.name).write_text(path.read_text())
    monkeypatch.setattr(lock, 'FOLDER', tmp_path)
    monkeypatch.setattr(lock, 'INPUT', tmp_path / 'dev.in')
    return tmp_path


def replace(path, old, new):
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


@pytest.mark.parametrize('name, old, new, message', [
    ('dev.in', 'wheel\n', 'wheel\nno_such-thing>2\n', 'has no no_such-thing>2'),
    ('dev.in', 'numpy\n', 'numpy<1  # old\n', 'is not numpy<1'),
    ('dev.in', 'wheel\n', "wheel\nold-thing; python_version < '3.0'\n", None),
    ('dev.in', '\nftfy\n', '\n', 'ftfy is asked for no longer'),
    ('py311.txt', '\nwheel==', '\nwhale==', 'has no wheel; whale is asked for no longer'),
    ('py311.txt', '\nmmdet==3.3.0', '\nmmdet==3.2.0', 'mmdet 3.2.0 is not mmdet==3.3.0'),
    ('py311.txt', '\nmmdet==3.3.0 \\\n', '\nmmdet==3.3.0\n', 'mmdet has no hash'),
    ('py311.txt', 'installed and tested', 'tested', 'its head is another'),
])  # fmt: skip
def test_differences_are_named(copies, name, old, new, message):
    replace(copies / name, old, new)
    wrong = '; '.join(lock.differences('3.11'))
    assert message in wrong if message else wrong == ''


def test_check_names_the_command(copies, monkeypatch):
    monkeypatch.setattr('sys.argv', ['lock.py', '--check'])
    lock.main()
    (copies / 'py313.txt').unlink()
    with pytest.raises(UserError, match='run `python tools/dev/lock.py`: py313.txt: missing$'):
        lock.main()
    assert run('tools/dev/lock.py', '--check').returncode == 0


def test_without_a_registry(copies, monkeypatch):
    """One sentence, and the lock that was there."""
    before = (copies / 'py311.txt').read_text()
    refused = subprocess.CompletedProcess([], 2, '', 'error: Failed to fetch:\n  Caused by: dns error\n')
    monkeypatch.setattr(lock.subprocess, 'run', lambda *args, **options: refused)
    with pytest.raises(UserError, match='uv resolves nothing for Python 3.11: error: Failed to fetch: Caused by: dns'):
        lock.resolve('3.11')
    assert (copies / 'py311.txt').read_text() == before and len(list(copies.iterdir())) == 1 + len(lock.PYTHONS)


@pytest.mark.hardening
def test_the_resolver_gives_the_same_lock(copies):
    before = (copies / 'py311.txt').read_text()
    try:
        lock.resolve('3.11')
    except UserError as error:
        pytest.skip(f'no registry: {error}')
    assert (copies / 'py311.txt').read_text() == before
