"""What every ImageNet config builds and how it trains, against architectures counted by hand and printed settings."""

import math
import re

import pytest
import torch
from torch import nn

import bnet_mm
from bnet_mm import BNET
from bnet_mm.layers.bnet import DepthwiseTransform
from helpers.configs import IMAGENET, R18, R101, blocks, learning_rates, load, norm_kind, norms_beside_bnet

MOBILENET = (2, 3, 4, 3, 3, 1)  # stages 2 to 7; the first has no expansion


def multiply_adds(model, size=224):
    """Millions of multiply-adds of convolutions, linear layers and BNET transforms; binary ones count 1/64."""
    from bnet_mm.models import BinaryConv2d

    total = []

    def count(layer, _, output):
        share = 1 / 64 if isinstance(layer, BinaryConv2d) else 1
        total.append(output.numel() * layer.weight[0].numel() * share)

    for layer in model.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear, DepthwiseTransform)):
            layer.register_forward_hook(count)
    model.to('meta').eval()(torch.empty(1, 3, size, size, device='meta'))
    return sum(total) / 1e6


# config -> printed #Params (None where nothing is printed), norms in all, and the names of those that are BNET
C50, C101 = blocks('bn3'), blocks('bn3', R101)
EXPANSIONS = blocks('conv.0.bn', MOBILENET, 2)
EXPECTED = {
    'resnet18_bn': (11.7, 20, []),
    'resnet18_bnet3': (11.7, 20, blocks('bn2', R18)),
    'resnet50_bn': (25.6, 53, []),
    'resnet50_bnet3': (25.7, 53, C50),
    'resnet50_bnet5': (25.9, 53, C50),
    'resnet50_bnet7': (None, 53, C50),
    'resnet50_bnet3_dilated2': (25.7, 53, C50),
    'resnet50_bnet3_a': (25.6, 53, blocks('bn1')),
    'resnet50_bnet3_b': (25.6, 53, blocks('bn2')),
    'resnet50_bnet3_abc': (25.7, 53, [*C50, *blocks('bn1'), *blocks('bn2')]),
    'resnet50_bnconv3': (25.7, 53, []),
    'resnet50_frelu_bn': (None, 53 + 39, []),  # three FReLUs in each of the 13 blocks of stages 1 to 3
    'resnet50_frelu_bnet3': (None, 53 + 39, C50),
    'resnet50_gn': (None, 53, []),
    'resnet50_gn_bnet3': (None, 53, blocks('gn3')),
    'resnet50_sn': (None, 53, []),
    'resnet50_sn_bnet3': (None, 53, blocks('sn3')),
    'resnet50_sn_8x32': (None, 53, []),
    'resnet50_sn_8x4': (None, 53, []),
    'resnet50_sn_8x1': (None, 53, []),
    'resnet50_sn_120e': (None, 53, []),
    'resnet101_sn_120e': (None, 104, []),
    'resnet50v2_sn_120e': (None, 1 + 3 * 16 + 1, []),
    'resnet101v2_sn_120e': (None, 1 + 3 * 33 + 1, []),
    'resnet50_bn_autoaugment_100e': (25.6, 53, []),
    'resnet50_bn_autoaugment_270e': (25.6, 53, []),
    'resnet50_bnet3_autoaugment_100e': (25.7, 53, C50),
    'resnet50_bnet3_autoaugment_270e': (25.7, 53, C50),
    'resnet101_bn': (44.5, 104, []),
    'resnet101_bnet3': (44.8, 104, C101),
    'resnet101_bnet3_freeze': (44.8, 104, C101),
    'resnet101_bnet5': (None, 104, C101),
    'resnext50_bn': (25.0, 53, []),
    'resnext50_bnet3': (25.1, 53, C50),
    'resnext101_bn': (None, 104, []),
    'resnext101_bnet5': (None, 104, C101),
    'mobilenetv2_w100_bn': (3.5, 52, []),
    'mobilenetv2_w100_bnet3': (None, 52, EXPANSIONS),  # 3.56; 3.5 is printed, as for BN
    'mobilenetv2_w050_bn': (2.0, 52, []),
    'mobilenetv2_w050_bnet3': (2.0, 52, EXPANSIONS),
    'mobilenetv2_w025_bn': (1.5, 52, []),
    'mobilenetv2_w025_bnet3': (1.5, 52, EXPANSIONS),
    'bireal18_bn': (None, 20, []),
    'bireal18_bnet3': (None, 20, [*blocks('bn1', R18), *blocks('bn2', R18)]),
}
IMAGENETTE = {'resnet50': 53, 'resnet50d': 55, 'resnest50': 71}  # norms; all become BNET


@pytest.mark.parametrize('name', [name for name in IMAGENET if name.endswith('_imagenet')])
def test_imagenet_model(build, name):
    printed, norms, where = EXPECTED[name.removesuffix('_imagenet')]
    model = build(name).train()
    bnets = {layer: module for layer, module in model.named_modules() if isinstance(module, BNET)}
    others = norms_beside_bnet(model)
    plain = dict(gn='GroupNorm', sn='SN2d').get(name.split('_')[1], 'BatchNorm2d')
    assert set(bnets) == set(where) and {norm_kind(layer.norm) for layer in bnets.values()} <= {plain}
    assert len(bnets) + len(others) == norms and set(others.values()) - {'BNConv'} == {plain}
    assert all(p.requires_grad for p in model.parameters()) and all(module.training for module in model.modules())
    if match := re.search(r'bnet(\d)', name):
        assert {layer.bnconv.k for layer in bnets.values()} == {int(match[1])}
    assert {layer.bnconv.dilation[0] for layer in bnets.values()} <= {2 if 'dilated2' in name else 1}
    if printed:
        assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == printed


@pytest.mark.parametrize('kind', ['bn', 'bnet3'])
@pytest.mark.parametrize('network', list(IMAGENETTE))
def test_imagenette_model(build, network, kind):
    model = build(f'{network}_{kind}_imagenette')
    count = sum(isinstance(layer, BNET if kind == 'bnet3' else nn.BatchNorm2d) for layer in model.modules())
    assert count == IMAGENETTE[network] and model.head.fc.out_features == 10


def test_every_config_is_checked_and_has_its_baseline():
    assert {name.removesuffix('_imagenet') for name in IMAGENET if name.endswith('_imagenet')} == set(EXPECTED)
    for name in IMAGENET:
        if re.search(r'bnet|bnconv', name):
            plain = re.sub(r'_bnet3_(dilated2|a|b|abc|freeze)_', '_bn_', name)
            plain = re.sub(r'(gn|sn)_bnet\d', r'\1', plain)
            assert re.sub(r'bnet\d|bnconv\d', 'bn', plain) in IMAGENET
        imports = load(name).custom_imports['imports']
        assert imports[:2] == ['bnet_mm', 'bnet_mm.host.compat']  # compat before anything that imports torchvision


def test_switchable_norms_of_one_image_have_no_batch_statistics(build):
    assert build('resnet50_sn_8x1_imagenet').backbone.sn1.kinds == ['IN', 'LN']
    assert build('resnet50_sn_8x4_imagenet').backbone.sn1.kinds == ['IN', 'LN', 'BN']


def test_bn_conv_sits_at_c(build):
    model = build('resnet50_bnconv3_imagenet')
    assert [name for name, layer in model.named_modules() if isinstance(layer, bnet_mm.BNConv)] == C50


@pytest.mark.parametrize(
    'name, printed',
    [('w100_bn', 300), ('w100_bnet3', 330), ('w050_bn', 97), ('w050_bnet3', 113), ('w025_bn', 37), ('w025_bnet3', 48)],
)
def test_mobilenet_has_the_printed_flops(build, name, printed):
    assert int(multiply_adds(build(f'mobilenetv2_{name}_imagenet'))) == printed


def test_bireal_flops(build):
    """162 and 173 are printed. Of the positions A, C and both, both is nearest; the baseline alone says the depth."""
    base = multiply_adds(build('bireal18_bn_imagenet'))
    assert round(base) == 164  # 163 in the Bi-Real paper
    both = multiply_adds(build('bireal18_bnet3_imagenet')) - base
    assert round(both, 1) == 13.5 and abs(both - 11) < abs(both / 2 - 11)


def steps(first, milestones, epochs):
    return [first * 0.1 ** sum(epoch >= milestone for milestone in milestones) for epoch in range(epochs)]


STEP = dict(optimizer='SGD', weight_decay=1e-4)
PAPER = {  # settings.json: images per GPU, GPUs, optimizer, rate of every epoch
    'resnet18_bn': (64, 4, STEP, steps(0.1, (30, 60, 90), 100)),
    'resnet50_bn': (64, 4, STEP, steps(0.1, (30, 60, 90), 100)),
    'resnet101_bn': (32, 8, STEP, steps(0.1, (30, 60, 90), 100)),
    'resnext50_bn': (32, 8, STEP, steps(0.1, (30, 60, 90), 100)),
    'resnet50_bn_autoaugment_100e': (64, 4, STEP, steps(0.1, (30, 60, 90), 100)),
    'resnet50_bn_autoaugment_270e': (64, 4, STEP, steps(0.1, (80, 160, 240), 270)),
    'mobilenetv2_w100_bn': (
        32,
        8,
        dict(optimizer='SGD', weight_decay=4e-5),
        [0.05 * (1 + math.cos(math.pi * epoch / 150)) / 2 for epoch in range(150)],
    ),
    'bireal18_bn': (64, 8, dict(optimizer='Adam', weight_decay=0), [1e-3 * (1 - epoch / 256) for epoch in range(256)]),
    'resnet50_sn_8x32': (32, 8, STEP, steps(0.1, (30, 60, 90), 100)),
    'resnet50_sn_8x4': (4, 8, STEP, steps(0.0125, (30, 60, 90), 100)),
    'resnet50_sn_8x1': (1, 8, STEP, steps(0.003125, (30, 60, 90), 100)),
    'resnet50_sn_120e': (
        32,
        8,
        STEP,
        [0.1 * epoch / 5 for epoch in range(5)] + [0.05 * (1 + math.cos(math.pi * t / 115)) for t in range(115)],
    ),
}
SAME = {  # the configs that must train as another one does
    'resnet18_bn': ['resnet18_bnet3'],
    'resnet50_bn': [
        *(f'resnet50_bnet{k}' for k in (3, 5, 7)),
        *(f'resnet50_bnet3_{what}' for what in ('a', 'b', 'abc', 'dilated2')),
        *(f'resnet50_{what}' for what in ('bnconv3', 'frelu_bn', 'frelu_bnet3', 'gn', 'gn_bnet3', 'sn', 'sn_bnet3')),
    ],
    'resnet101_bn': ['resnet101_bnet3', 'resnet101_bnet3_freeze', 'resnet101_bnet5'],
    'resnext50_bn': ['resnext50_bnet3', 'resnext101_bn', 'resnext101_bnet5'],
    'resnet50_bn_autoaugment_100e': ['resnet50_bnet3_autoaugment_100e'],
    'resnet50_bn_autoaugment_270e': ['resnet50_bnet3_autoaugment_270e'],
    'mobilenetv2_w100_bn': [f'mobilenetv2_w{w}_{n}' for w in ('100', '050', '025') for n in ('bn', 'bnet3')][1:],
    'bireal18_bn': ['bireal18_bnet3'],
    'resnet50_sn_120e': [f'{network}_sn_120e' for network in ('resnet101', 'resnet50v2', 'resnet101v2')],
}


@pytest.mark.parametrize('name', list(PAPER))
def test_training_settings_are_the_printed_ones(name):
    images, gpus, optimizer, rates = PAPER[name]
    cfg = load(f'{name}_imagenet')
    assert cfg.train_dataloader.batch_size == images
    assert cfg.auto_scale_lr.base_batch_size == images * gpus
    found = cfg.optim_wrapper.optimizer
    assert found.type == optimizer['optimizer'] and found.get('weight_decay', 0) == optimizer['weight_decay']
    assert found.get('momentum', 0.9) == 0.9
    found = learning_rates(cfg)
    assert found[::200] == pytest.approx(rates, rel=2e-3, abs=1e-6)  # the first iterations of the epochs
    if cfg.train_cfg.max_epochs in (120, 150):  # cosine down to zero, by iteration
        assert found[-1] < 1e-6
    pipeline = [step.type for step in cfg.train_dataloader.dataset.pipeline]
    assert ('AutoAugment' in pipeline) == ('autoaugment' in name)
    assert cfg.train_dataloader.dataset.pipeline[1].scale == 224
    assert [step.get('crop_size') for step in cfg.val_dataloader.dataset.pipeline].count(224) == 1


def test_variants_train_as_their_baseline():
    keys = ('optim_wrapper', 'param_scheduler', 'train_cfg', 'train_dataloader', 'val_dataloader', 'auto_scale_lr')
    for baseline, variants in SAME.items():
        expected = load(f'{baseline}_imagenet')
        for variant in variants:
            cfg = load(f'{variant}_imagenet')
            assert all(cfg.get(key) == expected.get(key) for key in keys), variant
    assert {*SAME, *PAPER, *(variant for variants in SAME.values() for variant in variants)} == set(EXPECTED)


def test_imagenette_settings():
    cfg = load('resnest50_bnet3_imagenette')
    assert learning_rates(cfg)[::200] == pytest.approx(
        [0.01 * (1 + math.cos(math.pi * t / 4)) / 2 for t in (0, 0, 1, 2, 3)]
    )
    assert cfg.train_dataloader.batch_size == 32
    assert cfg.train_dataloader.dataset.data_root == 'data/imagenette2'
