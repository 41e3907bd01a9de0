"""Outputs are never written over something, and never half."""

import re

import pytest

from bnet_mm.files import check_target, make_folder, written


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_targets(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_target('new.py')
    check_target(tmp_path / 'new.py')
    (tmp_path / 'old.py').touch()
    for path in ('old.py', str(tmp_path / 'old.py'), tmp_path):
        with pytest.raises(FileExistsError, match=f'^{re.escape(str(path))} exists already$'):
            check_target(path)
    with pytest.raises(FileNotFoundError, match='^the folder of no/new.py does not exist$'):
        check_target('no/new.py')
    assert names(tmp_path) == ['old.py']


def test_folders_for_outputs(tmp_path):
    for _ in range(2):
        make_folder(tmp_path / 'a' / 'b')
    assert (tmp_path / 'a' / 'b').is_dir()
    (tmp_path / 'file').touch()
    for path in (tmp_path / 'file', tmp_path / 'file' / 'below'):
        with pytest.raises(NotADirectoryError, match=f'^{re.escape(str(path))} is no folder for outputs: there is a'):
            make_folder(path)


def test_files_and_folders_get_their_name_in_the_end(tmp_path):
    with written(tmp_path / 'a.onnx') as temporary:
        assert temporary.parent == tmp_path and temporary.suffix == '.onnx'
        temporary.write_text('text')
        assert not (tmp_path / 'a.onnx').exists()
    with written(str(tmp_path / 'folder')) as temporary:
        temporary.mkdir()
        (temporary / 'b').write_text('b')
    assert names(tmp_path) == ['a.onnx', 'folder'] and names(tmp_path / 'folder') == ['b']
    assert (tmp_path / 'a.onnx').read_text() == 'text'


@pytest.mark.parametrize('error', [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize('make', [lambda path: path.write_text('half'), lambda path: path.mkdir(), lambda path: None])
def test_nothing_is_left_of_what_failed(tmp_path, make, error):
    with pytest.raises(error), written(tmp_path / 'a.pth') as temporary:
        make(temporary)
        raise error
    assert names(tmp_path) == []


def test_what_was_not_written_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError), written(tmp_path / 'a.pth'):
        pass
