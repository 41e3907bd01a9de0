"""The hosts' optimizer constructors put each parameter of BNET where BN's or a convolution's would go, once."""

import importlib
from pathlib import Path

import pytest
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, DefaultScope
from torch import nn

from bnet_mm import BNET, BNConv, FReLU

RECOGNISERS = [
    'tsm/tsm_imagenet-pretrained-r50_8xb16-1x1x8-50e_kinetics400-rgb.py',
    'tsm/tsm_imagenet-pretrained-mobilenetv2_8xb16-1x1x8-100e_kinetics400-rgb.py',
    'trn/trn_imagenet-pretrained-r50_8xb16-1x1x8-50e_sthv1-rgb.py',
    'tin/tin_imagenet-pretrained-r50_8xb6-1x1x8-40e_sthv1-rgb.py',
    'tanet/tanet_imagenet-pretrained-r50_8xb8-dense-1x1x8-100e_kinetics400-rgb.py',
]


def imported(scope):
    package = pytest.importorskip(scope)
    importlib.import_module('bnet_mm.host.compat')
    for part in ('models', 'engine'):
        importlib.import_module(f'{scope}.{part}')
    return Path(package.__file__).parent / '.mim' / 'configs'


def settings(model, optim_wrapper, scope):
    """Name -> (lr, weight decay) of every parameter; each must be in one group."""
    with DefaultScope.overwrite_default_scope(scope):
        groups = build_optim_wrapper(model, optim_wrapper).optimizer.param_groups
    found = {}
    for group in groups:
        for parameter in group['params']:
            assert id(parameter) not in found
            found[id(parameter)] = group['lr'], group['weight_decay']
    return {name: found[id(parameter)] for name, parameter in model.named_parameters() if parameter.requires_grad}


def with_bnet(cfg):
    backbone = cfg.model.backbone
    backbone.update(type='WithBNET', base=backbone.type, bnet=dict(k=3, where='C'), pretrained=None)
    if 'init_cfg' in backbone:
        backbone.init_cfg = None
    return cfg


@pytest.mark.parametrize('name', RECOGNISERS)
def test_stock_settings_of_mmactions_temporal_networks(name):
    """TSM's constructor: weights of convolutions lr and decay as the config says, biases twice the lr and no decay."""
    path = imported('mmaction') / 'recognition' / name
    if not path.is_file():
        pytest.skip(f'no {name} in this mmaction2')
    cfg = with_bnet(Config.fromfile(path))
    with DefaultScope.overwrite_default_scope('mmaction'):
        model = MODELS.build(cfg.model)
    found = settings(model, cfg.optim_wrapper, 'mmaction')
    assert set(found) == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    lr, decay = cfg.optim_wrapper.optimizer.lr, cfg.optim_wrapper.optimizer.weight_decay
    taps = {name: value for name, value in found.items() if '.bnconv.' in name}
    assert len(taps) >= 32
    bias = (2 * lr, 0) if cfg.optim_wrapper.get('constructor') == 'TSMOptimWrapperConstructor' else (lr, decay)
    assert all(value == ((lr, decay) if name.endswith('weight') else bias) for name, value in taps.items())


def test_tsms_constructor_and_our_other_layers():
    imported('mmaction')
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), BNET(4, norm='SyncBN'), FReLU(4), nn.Conv2d(4, 4, 1), BNConv(4), nn.Conv2d(4, 4, 1),
        BNET(4, norm=dict(type='GN', num_groups=2)), BNET(4, norm='CBN'), nn.Flatten(), nn.Linear(4, 2),
    )  # fmt: skip
    cfg = dict(
        constructor='TSMOptimWrapperConstructor', paramwise_cfg=dict(fc_lr5=True),
        optimizer=dict(type='SGD', lr=1.0, weight_decay=0.1),
    )  # fmt: skip
    found = settings(model, cfg, 'mmaction')
    assert set(found) == {name for name, _ in model.named_parameters()}
    assert found['1.bnconv.weight'] == (1.0, 0.1) and found['1.bnconv.bias'] == (2.0, 0)
    assert found['9.weight'] == (5.0, 0.1) and found['9.bias'] == (10.0, 0)


class WithBackbone(nn.Module):
    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone


@pytest.mark.parametrize('scope, constructor, options', [
    ('mmdet', 'LearningRateDecayOptimizerConstructor', dict(num_layers=6, decay_rate=0.5, decay_type='layer_wise')),
    ('mmseg', 'LearningRateDecayOptimizerConstructor', dict(num_layers=6, decay_rate=0.5, decay_type='stage_wise')),
])  # fmt: skip
def test_layer_decay_by_names(scope, constructor, options):
    """ConvNeXt with a BNET for the norm of a block: the depth of that block; taps decay, their bias does not."""
    imported(scope)
    pytest.importorskip('mmpretrain')
    importlib.import_module('mmpretrain.models')
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        backbone = MODELS.build(dict(type='ConvNeXt', arch='atto'))
    width = backbone.stages[1][0].depthwise_conv.out_channels
    backbone.stages[1][0].depthwise_conv = nn.Sequential(backbone.stages[1][0].depthwise_conv, BNET(width))
    cfg = dict(constructor=constructor, paramwise_cfg=options, optimizer=dict(type='AdamW', lr=1.0, weight_decay=0.1))
    found = settings(WithBackbone(backbone), cfg, scope)
    block = 'backbone.stages.1.0.depthwise_conv'
    assert found[f'{block}.1.bnconv.weight'] == found[f'{block}.0.weight']
    assert found[f'{block}.1.bnconv.bias'] == found[f'{block}.0.bias']
    assert found[f'{block}.1.bnconv.bias'][1] == 0 != found[f'{block}.1.bnconv.weight'][1]


def test_layer_decay_of_mmpretrain():
    """Its models tell the depth of a name."""
    imported('mmpretrain')
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        model = WithBackbone(MODELS.build(dict(type='VisionTransformer', arch='deit-tiny', img_size=32)))
    model.get_layer_depth = lambda name: model.backbone.get_layer_depth(name, 'backbone.')
    model.backbone.layers[2].bnet = BNET(192)
    cfg = dict(
        constructor='LearningRateDecayOptimWrapperConstructor',
        paramwise_cfg=dict(layer_decay_rate=0.5, bias_decay_mult=0.0),
        optimizer=dict(type='AdamW', lr=1.0, weight_decay=0.1),
    )
    found = settings(model, cfg, 'mmpretrain')
    lr = found['backbone.layers.2.ffn.layers.1.weight'][0]
    assert found['backbone.layers.2.bnet.bnconv.weight'] == (lr, 0.1)
    assert found['backbone.layers.2.bnet.bnconv.bias'] == (lr, 0.0)


def test_swins_constructor_of_mmaction():
    """Keys of paramwise_cfg are parts of names."""
    imported('mmaction')
    model = nn.ModuleDict(dict(norm=BNET(4), conv=nn.Conv2d(3, 4, 1)))
    cfg = dict(
        constructor='SwinOptimWrapperConstructor', paramwise_cfg=dict(norm=dict(decay_mult=0.0)),
        optimizer=dict(type='AdamW', lr=1.0, weight_decay=0.1),
    )  # fmt: skip
    found = settings(model, cfg, 'mmaction')
    assert {name for name, (_, decay) in found.items() if not decay} == {'norm.bnconv.weight', 'norm.bnconv.bias'}
