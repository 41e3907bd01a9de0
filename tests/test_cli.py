"""What the tools share; tests/tools/ runs them."""

import inspect
import re

import pytest
from mmengine.config import Config

from bnet_mm import cli
from bnet_mm.checkpoint.layouts import CheckpointError
from bnet_mm.cli import UserError, clear_errors, common_arguments, load_config, path_of, run_tool


@pytest.mark.parametrize('error, text', [
    (ValueError('wrong'), 'doing: ValueError: wrong'), (KeyError('name'), 'doing: KeyError: name'),
    (FileNotFoundError('a.py is not there'), 'doing: a.py is not there'), (CheckpointError('bad'), 'doing: bad'),
    (UserError('said already'), 'said already'), (RuntimeError(' spaces\n'), 'doing: RuntimeError: spaces'),
    (ValueError('two\n  lines'), 'doing: ValueError: two lines'),
    (PermissionError(13, 'Permission denied', 'a.py'), 'doing: a.py: Permission denied'),
])  # fmt: skip
def test_clear_errors(error, text, monkeypatch):
    monkeypatch.delenv('BNET_MM_TRACEBACK', raising=False)
    with pytest.raises(UserError) as caught, clear_errors('doing'):
        raise error
    assert str(caught.value) == text
    monkeypatch.setenv('BNET_MM_TRACEBACK', '1')
    with pytest.raises(type(error)), clear_errors('doing'):
        raise error


@pytest.mark.parametrize('rank, printed', [('0', 'error: too bad\n'), ('1', ''), (None, 'error: too bad\n')])
def test_run_tool(rank, printed, monkeypatch, capsys):
    monkeypatch.delenv('LOCAL_RANK', raising=False)
    if rank:
        monkeypatch.setenv('LOCAL_RANK', rank)

    def main():
        raise UserError('too bad')

    with pytest.raises(SystemExit) as end:
        run_tool(main)
    assert end.value.code == 2 and capsys.readouterr().err == printed
    run_tool(lambda: None)
    with pytest.raises(ZeroDivisionError):
        run_tool(lambda: 1 / 0)


def test_files_that_nobody_has_looked_at(tmp_path, monkeypatch, capsys):
    """Whatever cannot be read or written at last is a sentence, too."""
    monkeypatch.delenv('BNET_MM_TRACEBACK', raising=False)
    with pytest.raises(SystemExit) as end:
        run_tool(lambda: tmp_path.read_text())
    assert end.value.code == 2 and capsys.readouterr().err == f'error: {tmp_path}: Is a directory\n'
    monkeypatch.setenv('BNET_MM_TRACEBACK', '1')
    with pytest.raises(IsADirectoryError):
        run_tool(lambda: tmp_path.read_text())


def test_a_file_that_one_process_lacks(tmp_path, monkeypatch, capsys):
    """Another node's disk, for one: the first process of the machine knows nothing of it."""
    monkeypatch.delenv('BNET_MM_TRACEBACK', raising=False)
    monkeypatch.setenv('LOCAL_RANK', '3')
    with pytest.raises(SystemExit) as done:
        run_tool((tmp_path / 'no.txt').read_text)
    assert done.value.code == 2 and capsys.readouterr().err == f'error: {tmp_path}/no.txt: No such file or directory\n'


def test_paths_of_configs(tmp_path):
    """A file, a name of ours, a path in a library; of others the nearest."""
    (tmp_path / 'a.py').touch()
    assert path_of(str(tmp_path / 'a.py')) == str(tmp_path / 'a.py')
    assert path_of('bnet_mm::resnet18_bn_imagenet').endswith('configs/resnet18_bn_imagenet.py')
    for wrong, message in (
        (str(tmp_path), f'config {tmp_path} is a folder, not a file'), ('nope.py', 'config nope.py does not exist'),
        ('bnet_mm::resnet18_bn_imagenett', 'did you mean resnet18_bn_imagenet.py'), ('nix::a', 'nix is not installed'),
    ):  # fmt: skip
        with pytest.raises(UserError, match=re.escape(message)):
            path_of(wrong)


def test_config_of_a_library(load):
    pytest.importorskip('mmdet')
    cfg = load_config(common_arguments('').parse_args(['mmdet::retinanet/retinanet_r50_fpn_1x_coco.py']))
    assert cfg.model.type == 'RetinaNet' and cfg.work_dir == 'work_dirs/retinanet_r50_fpn_1x_coco'
    with pytest.raises(UserError, match='mmdet has no config retinanet_r50; the nearest are mmdet::'):
        load_config(common_arguments('').parse_args(['mmdet::retinanet_r50']))


@pytest.fixture
def load(tmp_path, monkeypatch):
    """load(text, *options): a config of this text, as a tool reads it."""
    monkeypatch.setenv('LOCAL_RANK', '0')

    def read(text, *options):
        (tmp_path / 'mine.py').write_text(text)
        return load_config(common_arguments('').parse_args([str(tmp_path / 'mine.py'), *options]))

    return read


def test_options_are_merged(load):
    text = "model = dict(type='ResNet', depth=50)\nwork_dir = 'there'\ntrain_dataloader = dict(batch_size=2)\n"
    cfg = load(text)
    assert (cfg.work_dir, cfg.launcher, cfg.model.depth) == ('there', 'none', 50)
    options = ('--work-dir', 'here', '--launcher', 'pytorch', '--cfg-options', 'model.depth=18', 'randomness.seed=3')
    cfg = load(text, *options)
    assert (cfg.work_dir, cfg.launcher, cfg.model.depth, cfg.randomness) == ('here', 'pytorch', 18, dict(seed=3))
    assert load("model = dict(type='ResNet')").work_dir == 'work_dirs/mine'


def test_loaders_of_mmpretrain_are_completed(load):
    text = "model = dict(type='ResNet')\ndefault_scope = '{}'\n"
    text += 'train_dataloader = dict(batch_size=2)\nval_dataloader = None\n'
    assert load(text.format('mmpretrain')).train_dataloader.collate_fn == dict(type='default_collate')
    assert 'collate_fn' not in load(text.format('mmdet')).train_dataloader


@pytest.mark.parametrize('text, option, message', [
    ('lr = 0.1', 'lr=0.2', 'lr is only a variable inside the config file'),
    ('a = 1', 'custom_imports.imports=[os]', 'put it in the config file'),
    ('a = 1', 'optim_wraper.lr=1', 'there is no optim_wraper; did you mean optim_wrapper?'),
    ('a = 1', 'xyz=1', 'there is no xyz$'), ('a = ', 'model.type=1', 'mine.py cannot be read: SyntaxError'),
])  # fmt: skip
def test_options_that_nobody_would_read(load, text, option, message):
    with pytest.raises(UserError, match=message):
        load(text, '--cfg-options', option)


@pytest.mark.parametrize('imports, fine', [
    ("dict(imports=['bnet_mm'])", True), ("dict(imports='bnet_mm.models')", True), ('None', False),
    ("dict(imports=['os', 'bnet_mmm'])", False),
])  # fmt: skip
def test_types_of_ours_need_the_import(load, imports, fine, monkeypatch):
    monkeypatch.setattr(Config, '_import_custom', lambda *_: None, raising=False)
    monkeypatch.setattr('mmengine.config.config.import_modules_from_strings', lambda **_: None)
    text = f"custom_imports = {imports}\nmodel = dict(neck=[dict(norm_cfg=dict(type='BNET'))])\n"
    if fine:
        return load(text)
    with pytest.raises(UserError, match="mine.py uses type='BNET' but does not import bnet_mm: add custom_imports"):
        load(text)
    load(text.replace('BNET', 'BN'))


def test_the_other_keys_are_no_arguments_of_the_runner():
    assert not set(cli.OTHER_KEYS) & set(inspect.signature(cli.Runner.__init__).parameters)
