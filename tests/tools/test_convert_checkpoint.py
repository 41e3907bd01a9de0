"""tools/convert_checkpoint.py as a user runs it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from torch import nn

from helpers import official_layouts as official
from helpers.checkpoints import WIDTH, backbone_cfg, save
from helpers.paths import REPO

pytestmark = pytest.mark.usefixtures('mmdet_scope')


def convert(*arguments):
    command = [sys.executable, str(REPO / 'tools' / 'convert_checkpoint.py'), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize('kind', ['imagenet', 'detection', 'old detection'])
def test_conversion_tool(tmp_path, kind):
    if kind == 'imagenet':
        checkpoint = official.imagenet_checkpoint(50, 3, seed=4, width=WIDTH)
    else:
        checkpoint = official.detection_checkpoint(50, 3, seed=4, old_form=kind.startswith('old'), width=WIDTH)
    source = save(checkpoint, tmp_path / 'in.pth')
    done = convert(source, tmp_path / 'out.pth')
    assert done.returncode == 0, done.stderr
    assert 'unmatched (0)' in done.stdout and 'optimizer' in done.stdout.splitlines()[-2]
    assert f'renamed ({16 * 5}):' in done.stdout
    converted = torch.load(tmp_path / 'out.pth', weights_only=True)
    model = MODELS.build(backbone_cfg(k=3))
    prefix = '' if kind == 'imagenet' else 'backbone.'
    own = {key[len(prefix) :]: value for key, value in converted['state_dict'].items() if key.startswith(prefix)}
    assert set(model.state_dict()) == set(own) - {'fc.weight', 'fc.bias'}
    twin = MODELS.build(backbone_cfg(k=3))
    model.load_state_dict(own, strict=False)
    original = {k[len(prefix) :]: v for k, v in checkpoint['state_dict'].items() if k.startswith(prefix)}
    twin.load_state_dict(original, strict=False)
    for name, value in twin.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name

    again = convert(source, tmp_path / 'out.pth')
    assert again.returncode != 0 and 'exists already' in again.stderr


@pytest.mark.parametrize('change, message', [
    (lambda sd: sd.pop('layer1.0.bnet3.running_var'), 'layer1.0.bn3.norm.running_var is missing'),
    (lambda sd: sd.update({'layer1.0.bnet3.gamma': torch.ones(3)}), 'layer1.0.bnet3.gamma is no part of a BNET layer'),
])  # fmt: skip
def test_conversion_writes_nothing_on_leftovers(tmp_path, change, message):
    checkpoint = official.imagenet_checkpoint(50, 3, seed=4, width=WIDTH)
    change(checkpoint['state_dict'])
    done = convert(save(checkpoint, tmp_path / 'in.pth'), tmp_path / 'out.pth')
    assert done.returncode != 0 and message in done.stdout
    assert sorted(p.name for p in tmp_path.iterdir()) == ['in.pth']


@pytest.mark.parametrize('state_dict, message', [
    ({'fc.weight': torch.zeros(2, 2), 'fc.bias': torch.zeros(2)},
     "has no tensor below 'backbone.', as a classifier has; its first are fc.weight, fc.bias"),
    ({}, 'holds no state_dict of tensors'),
    (None, 'in.pth does not exist'),
])  # fmt: skip
def test_backbone_of_something_else(tmp_path, state_dict, message):
    """That it works is tested with the command of configs/README.md, in test_models.py."""
    if state_dict is not None:
        save(dict(state_dict=state_dict), tmp_path / 'in.pth')
    done = convert(tmp_path / 'in.pth', tmp_path / 'out.pth', '--backbone')
    assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1
    assert not [name for name in os.listdir(tmp_path) if name != 'in.pth']
    save(dict(state_dict={'backbone.conv1.weight': torch.zeros(1)}), tmp_path / 'in.pth')
    (tmp_path / 'out.pth').write_text('mine')
    done = convert(tmp_path / 'in.pth', tmp_path / 'out.pth', '--backbone')
    assert done.returncode == 2 and 'exists already' in done.stderr and (tmp_path / 'out.pth').read_text() == 'mine'


def test_conversion_of_something_else(tmp_path):
    bn = save(dict(state_dict=MODELS.build(backbone_cfg(bnet=False)).state_dict()), tmp_path / 'bn.pth')
    for source, message in ((bn, 'nothing to convert'), (tmp_path / 'no.pth', 'does not exist')):
        done = convert(source, tmp_path / 'out.pth')
        assert done.returncode != 0 and message in done.stderr and 'Traceback' not in done.stderr
    assert not (tmp_path / 'out.pth').exists()


def test_readme_command_makes_a_backbone_for_detectors(tmp_path):
    """The command of configs/README.md, on a checkpoint of resnet50_bnet5_imagenet.py, for mmdet's ResNet."""
    pytest.importorskip('mmdet.models')
    command = re.search(r'^python (tools/convert_checkpoint.py .+)', (REPO / 'configs/README.md').read_text(), re.M)[1]
    tool, source, target, option = command.split()
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        trained = MODELS.build(Config.fromfile(REPO / 'configs/resnet50_bnet5_imagenet.py').model)
    for p in trained.parameters():
        nn.init.normal_(p)
    source, target = tmp_path / Path(source).name, tmp_path / Path(target).name
    torch.save(dict(meta=dict(epoch=100), state_dict=trained.state_dict(), optimizer={}), source)
    done = subprocess.run([sys.executable, tool, source, target, option], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0 and 'left out: head.fc.weight, head.fc.bias' in done.stdout, done.stderr
    assert torch.load(target, weights_only=True)['meta'] == dict(epoch=100, converted_from=source.name)
    init = dict(type='Pretrained', checkpoint=str(target))
    with DefaultScope.overwrite_default_scope('mmdet'):
        detector = MODELS.build(dict(type='WithBNET', base='ResNet', bnet=dict(k=5), depth=50, init_cfg=init))
        detector.init_weights()
    expected = trained.backbone.state_dict()
    assert expected.keys() == detector.state_dict().keys()
    assert all(torch.equal(value, expected[key]) for key, value in detector.state_dict().items())
