"""init_cfg=dict(type='Pretrained') refuses a file of another network."""

import copy

import pytest
import torch
from mmengine.registry import MODELS

from bnet_mm.checkpoint.layouts import CheckpointError
from helpers import reference
from helpers.checkpoints import WIDTH, backbone_cfg, by_pretrained, save

pytestmark = pytest.mark.usefixtures('mmdet_scope')


def test_pretrained_file_of_which_nothing_fits_is_refused(tmp_path):
    """Plain BN models too; the model is as it was; the message has file, keys looked for, keys found, and a cure."""
    classifier = {f'backbone.{name}': v for name, v in MODELS.build(backbone_cfg(bnet=False)).state_dict().items()}
    wide = MODELS.build(dict(backbone_cfg(bnet=False), base_channels=12, stem_channels=12)).state_dict()
    norms = {name: v for name, v in MODELS.build(backbone_cfg(bnet=False)).state_dict().items() if v.dim() < 2}
    files = [
        (classifier, 'the file has backbone.conv1.weight (8, 3, 7, 7), ', "say prefix='backbone' in init_cfg"),
        (wide, 'the file has conv1.weight (12, 3, 7, 7), ', 'more'),
        (norms, 'the file has bn1.weight (8,), bn1.bias (8,), bn1.running_mean (8,) and ', 'more'),
        ({}, 'the file has no tensor', 'no tensor'),
    ]
    for bnet in (True, False):
        for state_dict, found, end in files:
            path = save(dict(state_dict=state_dict), tmp_path / 'other.pth')
            model = MODELS.build(backbone_cfg(bnet=bnet, init_cfg=dict(type='Pretrained', checkpoint=path)))
            before = copy.deepcopy(model.state_dict())
            with pytest.raises(CheckpointError) as error:
                model.init_weights()
            text = str(error.value)
            assert text.startswith(f'pretrained weights {path}: nothing in this file fits ResNet, which looked for ')
            assert found in text and text.endswith(end) and 'looked for conv1.weight (8, 3, 7, 7), layer1' in text
            assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_pretrained_prefix(tmp_path):
    """What the message proposes works; a prefix that no key has is refused with the name of the file."""
    plain = reference.randomise(MODELS.build(backbone_cfg(bnet=False)))
    path = save({f'backbone.{name}': value for name, value in plain.state_dict().items()}, tmp_path / 'a.pth')
    model = MODELS.build(dict(backbone_cfg(), init_cfg=dict(type='Pretrained', checkpoint=path, prefix='backbone')))
    model.init_weights()
    assert torch.equal(model.layer1[0].bn3.weight, plain.layer1[0].bn3.weight)
    model = MODELS.build(dict(backbone_cfg(), init_cfg=dict(type='Pretrained', checkpoint=path, prefix='neck')))
    with pytest.raises(CheckpointError, match=f'pretrained weights {path}: neck. is not in the pretrained model'):
        model.init_weights()


def test_pretrained_file_of_a_part_is_accepted(tmp_path, leftovers):
    weight = torch.randn(WIDTH, 3, 7, 7)
    path = save({'conv1.weight': weight, 'fc.weight': torch.zeros(2, 2)}, tmp_path / 'a.pth')
    model = by_pretrained(backbone_cfg(bnet=False), path)
    assert torch.equal(model.conv1.weight, weight) and len(leftovers()) == 1
