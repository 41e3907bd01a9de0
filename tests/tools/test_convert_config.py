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
    assert text.count('\n') == 4 and "_base_ = '../old.py'" in text
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
    assert again.returncode == 1 and again.stderr.endswith('error: nothing was written: sub/new.py exists already\n')
    torch.save({k: v for k, v in old.state_dict().items() if k != 'backbone.conv1.weight'}, tmp_path / 'less.pth')
    less = convert('old.py', '-o', 'sub/less.py', '--from-checkpoint', 'less.pth', cwd=tmp_path)
    assert less.returncode == 1 and 'lacks 1 tensors of this model: backbone.conv1.weight' in less.stderr
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
    (['mmdet::nix.py', '-o', 'new.py'], 'config mmdet::nix.py cannot be inherited from'),
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
