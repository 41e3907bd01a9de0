"""Recording of maps, and which layers are shown by default."""

import pytest
import torch
from mmengine.registry import MODELS
from torch import nn

from bnet_mm.layers import BNET
from bnet_mm.visualization.maps import attention_map, default_layers, recorded_maps, stage_names
from helpers.nets import backbone
from visualization.test_enhancement import random_layer, with_polyfit


def holder(kind='ResNet', bnet=None, **options):
    """A model whose backbone is one of mmdet's."""
    model = nn.Module()
    model.backbone = backbone(kind, bnet, **options)
    return model


def test_attention_is_the_mean_square():
    x = torch.randn(2, 5, 3, 4)
    want = sum(x[:, c] ** 2 for c in range(5)) / 5
    torch.testing.assert_close(attention_map(x.half()), want, atol=1e-2, rtol=1e-2)
    torch.testing.assert_close(attention_map(x), want)


@pytest.mark.usefixtures('mmdet_scope')
@pytest.mark.parametrize('depth, where, last', [(18, 'C', 'bn2'), (50, 'A', 'bn1'), (50, 'all', 'bn3')])
def test_last_bnet_of_each_stage(depth, where, last):
    """Not that of the shortcut, which a stage with one block has last."""
    blocks = [1, 1, 1, 1] if depth == 18 else [2, 3, 5, 2]
    layers, stages = default_layers(holder(depth=depth, bnet=dict(k=3, where=where)))
    assert stages == [f'backbone.layer{i}' for i in (1, 2, 3, 4)]
    assert layers == [f'{stage}.{block}.{last}' for stage, block in zip(stages, blocks)]


@pytest.mark.usefixtures('mmdet_scope')
def test_stages():
    assert default_layers(holder(depth=18))[0] == []  # BN has stages, but nothing to enhance
    assert stage_names(holder(depth=18, deep_stem=True))[0] == 'backbone.layer1'  # the stem is a sequence too
    mobile = MODELS.build(dict(type='MobileNetV2'))
    assert stage_names(mobile) == [f'layer{i}' for i in range(1, 8)]
    assert stage_names(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))) == []


def test_maps_are_those_of_the_pass():
    """The layer runs unfused while it is watched, its output is the same, and no hook is left."""
    layer = random_layer(4, 5)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), layer, nn.ReLU()).eval()
    images = torch.randn(2, 3, 9, 8)
    with torch.no_grad():
        want = model(images)
        with recorded_maps(model, ['1', '2']) as maps:
            got = model(images)
        x_hat = layer.norm(model[0](images))
        assert (maps['1'].numpy() == with_polyfit(x_hat, layer.bnconv(x_hat))).all()
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(maps['2'], attention_map(want))
    assert not layer.bnconv._forward_hooks and not model[2]._forward_hooks


def test_unknown_name_leaves_no_hook():
    model = nn.Sequential(BNET(3), nn.ReLU())
    with pytest.raises(AttributeError, match='nope'):
        with recorded_maps(model, ['0', 'nope']):
            pass
    assert not model[0].bnconv._forward_hooks
