"""tools/convert_config.py as a user runs it."""

import os
import re
import subprocess
import sys

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope

from helpers import reference
from helpers.hosts import import_host_models
from helpers.nets import bnet_names
from helpers.paths import REPO
from helpers.tools import load_tool

RETINANET = """
_base_ = 'mmdet::retinanet/retinanet_r18_fpn_1x_coco.py'
custom_imports = dict(imports=['colorsys'], allow_failed_imports=False)
model = dict(backbone=dict(init_cfg=None), bbox_head=dict(num_classes=3))
"""


def convert(*arguments, cwd=REPO):
    env = dict(os.environ, PYTHONPATH=REPO, PYTHONWARNINGS='ignore')
    command = [sys.executable, f'{REPO}/tools/convert_config.py', *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=600)


def test_convert_config_and_its_checkpoint(tmp_path):
    """The new config inherits by a relative path, and its checkpoint computes what the BN checkpoint does."""
    import_host_models('mmdet')
    (tmp_path / 'sub').mkdir()
    (tmp_path / 'old.py').write_text(RETINANET)
    cfg = Config.fromfile(tmp_path / 'old.py')
    with DefaultScope.overwrite_default_scope('mmdet'):
        old = reference.randomise(MODELS.build(cfg.model)).eval()
    torch.save(dict(meta=dict(epoch=3), state_dict=old.state_dict()), tmp_path / 'bn.pth')
    arguments = ['old.py', '-o', 'sub/new.py', '--k', 5, '--where', 'AC', '--from-checkpoint', 'bn.pth']
    done = convert(*arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert 'enhanced 16 of 20 norms of RetinaNet' in done.stdout and 'wrote sub/new.py and sub/new.pth' in done.stdout
    assert sorted(os.listdir(tmp_path / 'sub')) == ['new.pth', 'new.py']
    text = (tmp_path / 'sub/new.py').read_text()
    assert text.count('\n') == 5 and "_base_ = '../old.py'" in text
    cfg = Config.fromfile(tmp_path / 'sub/new.py')
    assert cfg.custom_imports['imports'] == ['colorsys', 'bnet_mm'] and cfg.model.bbox_head.num_classes == 3
    with DefaultScope.overwrite_default_scope('mmdet'):
        new = MODELS.build(cfg.model).eval()
    assert type(new) is type(old) and len(bnet_names(new)) == 16 and new.backbone.layer1[0].bn1.bnconv.k == 5
    checkpoint = torch.load(tmp_path / 'sub/new.pth', weights_only=True)
    new.load_state_dict(checkpoint['state_dict'], strict=True)
    assert checkpoint['meta'] == dict(epoch=3, converted_from='bn.pth')
    x = torch.randn(1, 3, 64, 96)
    for got, want in zip(new(x, mode='tensor'), old(x, mode='tensor')):
        for one, two in zip(got, want):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4 * two.abs().max().item())

    again = convert(*arguments, cwd=tmp_path)
    assert again.returncode == 2 and again.stderr.endswith('error: nothing was written: sub/new.py exists already\n')
    torch.save({k: v for k, v in old.state_dict().items() if k != 'backbone.conv1.weight'}, tmp_path / 'less.pth')
    less = convert('old.py', '-o', 'sub/less.py', '--from-checkpoint', 'less.pth', cwd=tmp_path)
    assert less.returncode == 2 and 'lacks 1 tensors of this model: backbone.conv1.weight' in less.stderr
    assert sorted(os.listdir(tmp_path / 'sub')) == ['new.pth', 'new.py']


@pytest.mark.parametrize('arguments, message', [
    (['nix.py', '-o', 'new.py'], 'config nix.py does not exist'),
    (['old.py', '-o', 'new.yaml'], 'a config file ends in .py'),
    (['old.py', '-o', 'nix/new.py'], 'the folder of nix/new.py does not exist'),
    (['empty.py', '-o', 'new.py'], 'config empty.py has no model with a type'),
    (['bnet.py', '-o', 'new.py'], 'has BNET already'),
    (['old.py', '-o', 'new.py', '--k', '4'], 'k must be a positive odd integer, got 4'),
    (['old.py', '-o', 'new.py', '--where', 'nowhere'], "no norm to replace at where='nowhere' in RetinaNet"),
    (['old.py', '-o', 'new.py', '--from-checkpoint', 'nix.pth'], 'nix.pth'),
    (['mmdet::nix.py', '-o', 'new.py'], 'mmdet has no config nix.py; the nearest are'),
], ids=lambda value: value if isinstance(value, str) else None)  # fmt: skip
def test_convert_config_refuses_before_writing(tmp_path, monkeypatch, arguments, message):
    """In one process: what a user sees is the same sentence."""
    import_host_models('mmdet')
    convert_config = load_tool('convert_config')
    (tmp_path / 'old.py').write_text(RETINANET)
    (tmp_path / 'empty.py').write_text('a = 1\n')
    (tmp_path / 'bnet.py').write_text("model = dict(type='WithBNET', base='RetinaNet', bnet=dict(k=3))\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'argv', ['convert_config.py', *arguments])
    with pytest.raises(convert_config.UserError, match=re.escape(message)):
        convert_config.main()
    assert sorted(os.listdir(tmp_path)) == ['bnet.py', 'empty.py', 'old.py']


NAMED_RUN = (
    RETINANET
    + """
work_dir = 'runs/bn/'
load_from = 'old.pth'
resume = True
visualizer = dict(name='v', vis_backends=[dict(type='WandbVisBackend', init_kwargs=dict(project='p', name='bn'))])
"""
)


def test_runs_do_not_share_what_names_them(tmp_path):
    """A work_dir of its own, also two levels below; everything else that names a run is said."""
    import_host_models('mmdet')
    (tmp_path / 'named.py').write_text(NAMED_RUN)
    (tmp_path / 'old.py').write_text("_base_ = 'named.py'\n")
    done = convert('old.py', '-o', 'new.py', cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    cfg = Config.fromfile(tmp_path / 'new.py')
    assert cfg.work_dir == 'runs/new' and cfg.load_from == 'old.pth'
    said = [line for line in done.stdout.splitlines() if line.startswith('inherited from old.py')]
    places = ['load_from', 'resume', 'visualizer.vis_backends.0.init_kwargs.project']
    places.append('visualizer.vis_backends.0.init_kwargs.name')
    assert sorted(line.split(': ')[1].split(' = ')[0] for line in said) == sorted(places)
    assert 'work_dir is runs/new, since that of old.py is runs/bn/' in done.stdout


def test_without_a_work_dir_nothing_is_said(tmp_path):
    import_host_models('mmdet')
    (tmp_path / 'old.py').write_text(RETINANET)
    done = convert('old.py', '-o', 'new.py', cwd=tmp_path)
    assert 'work_dir' not in done.stdout + (tmp_path / 'new.py').read_text() and 'inherited' not in done.stdout


def test_converted_checkpoint_is_what_the_new_config_loads(tmp_path, monkeypatch):
    """From any folder; and the output says how to test at once."""
    import_host_models('mmdet')
    (tmp_path / 'sub').mkdir()
    (tmp_path / 'old.py').write_text(NAMED_RUN)
    cfg = Config.fromfile(tmp_path / 'old.py')
    with DefaultScope.overwrite_default_scope('mmdet'):
        torch.save(dict(state_dict=MODELS.build(cfg.model).state_dict()), tmp_path / 'bn.pth')
    done = convert('old.py', '-o', 'sub/new.py', '--from-checkpoint', 'bn.pth', cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert 'python tools/test.py sub/new.py sub/new.pth' in done.stdout and 'load_from = ' not in done.stdout
    for folder in (tmp_path, tmp_path / 'sub'):
        monkeypatch.chdir(folder)
        assert os.path.samefile(Config.fromfile(tmp_path / 'sub/new.py').load_from, tmp_path / 'sub/new.pth')


@pytest.mark.parametrize('arguments, message', [
    (['mmdet::nope.py'], 'mmdet has no config nope.py; the nearest are mmdet::'),
    (['mmdet::retinanet/retinanet_r50_fpn_1x_coc'], 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'),
    (['mmnope::a.py'], 'mmnope is not installed'),
    ([f'{REPO}/configs/faster_rcnn_r50_bnet5_1x.py', '--k', 4], '--k must be a positive odd integer, got 4'),
    ([f'{REPO}/configs/faster_rcnn_r50_bnet5_1x.py'], '--cfg-options model.backbone.bnet.k=7'),
])  # fmt: skip
def test_what_a_newcomer_types_wrong(arguments, message, tmp_path):
    import_host_models('mmdet')
    done = convert(*arguments, '-o', 'x.py', cwd=tmp_path)
    assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1
    assert not os.listdir(tmp_path)
