"""The ImageNet and Imagenette configs, the backbones of bnet_mm.models, and FreezeTransform."""

import copy
import functools
import importlib.util
import math
import re
import sys

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.registry import MODELS, OPTIMIZERS, PARAM_SCHEDULERS, DefaultScope
from mmengine.runner import Runner
from paths import REPO
from torch import nn

import bnet_mm.compat
from bnet_mm import BNET
from bnet_mm.hooks import FreezeTransform
from bnet_mm.norms.bnet import DepthwiseTransform

pytest.importorskip('mmpretrain')
if importlib.util.find_spec('torchvision') is None:
    pytest.skip('mmpretrain needs torchvision', allow_module_level=True)

from bnet_mm.models import BinaryConv2d, BiRealResNet, ResNetV2  # noqa: E402
from bnet_mm.models.bireal import BiRealBlock, binary_activation, binary_weight  # noqa: E402
from bnet_mm.models.resnet_v2 import PreActivationBottleneck  # noqa: E402

CONFIGS = sorted(
    path.stem for pattern in ('*_imagenet.py', '*_imagenette.py') for path in REPO.glob(f'configs/{pattern}')
)
R18, R50, R101 = (2, 2, 2, 2), (3, 4, 6, 3), (3, 4, 23, 3)
MOBILENET = (2, 3, 4, 3, 3, 1)  # stages 2 to 7; the first has no expansion
NORMS = (nn.BatchNorm2d, nn.GroupNorm, bnet_mm.norms.SN2d, bnet_mm.BNConv)


# ---------------------------------------------------------------------------------------------------------- Bi-Real Net


def test_sign_of_activations_and_its_gradient():
    x = torch.cat([torch.randn(1000).double() * 1.5, torch.tensor([-2.0, -1, 0, 1, 2]).double()]).requires_grad_()
    weight = torch.randn(len(x)).double()
    y = binary_activation(x)
    assert y.dtype == x.dtype and torch.equal(y, torch.tensor([-1.0 if value < 0 else 1.0 for value in x]).double())
    (y * weight).sum().backward()
    twin = x.detach().clone().requires_grad_()  # ApproxSign, eq. 6 of the paper: its derivative is the gradient
    pieces = [twin * 0 - 1, 2 * twin + twin**2, 2 * twin - twin**2, twin * 0 + 1]
    index = (twin >= -1).long() + (twin >= 0).long() + (twin >= 1).long()
    (torch.stack(pieces).gather(0, index[None])[0] * weight).sum().backward()
    torch.testing.assert_close(x.grad, twin.grad, rtol=1e-12, atol=1e-12)


def test_sign_of_weights_and_its_gradient():
    weight = (torch.randn(4, 3, 3, 3).double() * 0.8).requires_grad_()
    upstream = torch.randn_like(weight)
    binary = binary_weight(weight)
    for filter_, result in zip(weight.detach(), binary):
        scale = sum(abs(value) for value in filter_.flatten().tolist()) / filter_.numel()
        torch.testing.assert_close(result, scale * (2 * (filter_ > 0) - 1.0).double())
    (binary * upstream).sum().backward()
    assert 0 < (weight.abs() > 1).sum() < weight.numel()
    torch.testing.assert_close(weight.grad, torch.where(weight.abs() > 1, 0, upstream))


def test_binary_convolution_is_one_of_signs():
    conv = BinaryConv2d(3, 6, 3, stride=2, padding=1, bias=False).double()
    x = torch.randn(2, 3, 7, 8).double()
    windows = F.unfold(torch.where(x < 0, -1.0, 1.0).double(), 3, padding=1, stride=2)
    scale = conv.weight.abs().flatten(1).mean(1)
    expected = scale[:, None] * (conv.weight.sign().flatten(1) @ windows)
    torch.testing.assert_close(conv(x), expected.view(2, 6, 4, 4))


def norm_of(x, layer):
    return F.batch_norm(x, layer.running_mean, layer.running_var, layer.weight, layer.bias, eps=layer.eps)


def randomised(module):
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.weight.data.uniform_(-1, 1), layer.bias.data.normal_()
            layer.running_mean.normal_(), layer.running_var.uniform_(0.5, 2)
    return module.double().eval()


@pytest.mark.parametrize('stride', [1, 2])
def test_bireal_block_has_a_shortcut_around_each_convolution(stride):
    down = None
    if stride == 2:
        down = nn.Sequential(nn.AvgPool2d(2, 2), nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4))
    block = BiRealBlock(4, 4, stride=stride, downsample=down)
    randomised(block)
    x = torch.randn(2, 4, 6, 6).double()
    middle = norm_of(block.conv1(x), block.bn1) + (x if down is None else down(x))
    torch.testing.assert_close(block(x), norm_of(block.conv2(middle), block.bn2) + middle)


def test_bireal_resnet():
    model = BiRealResNet(depth=18, out_indices=(0, 1, 2, 3))
    model.init_weights()
    outputs = model(torch.randn(2, 3, 64, 64))
    assert [tuple(y.shape) for y in outputs] == [(2, 64 * 2**i, 16 >> i, 16 >> i) for i in range(4)]
    binary = [name for name, module in model.named_modules() if isinstance(module, BinaryConv2d)]
    assert binary == [f'layer{i}.{j}.conv{k}' for i in (1, 2, 3, 4) for j in (0, 1) for k in (1, 2)]
    assert not any(isinstance(module, nn.ReLU) for module in model.modules())
    assert all(float(block.bn2.weight.min()) == 1 for block in model.layer4)
    outputs[3].square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


# ------------------------------------------------------------------------------------------------------------ ResNet v2


@pytest.mark.parametrize('stride', [1, 2])
def test_pre_activation_bottleneck(stride):
    projection = nn.Conv2d(8, 8, 1, stride=stride, bias=False)
    down = nn.Sequential(projection, nn.BatchNorm2d(8)) if stride == 2 else None
    block = PreActivationBottleneck(8, 8, stride=stride, downsample=down)
    randomised(block), projection.double()
    x = torch.randn(2, 8, 6, 6).double()
    active = F.relu(norm_of(x, block.bn1))
    out = F.conv2d(active, block.conv1.weight)
    out = F.conv2d(F.relu(norm_of(out, block.bn2)), block.conv2.weight, stride=stride, padding=1)
    out = F.conv2d(F.relu(norm_of(out, block.bn3)), block.conv3.weight)
    shortcut = x if stride == 1 else F.conv2d(active, projection.weight, stride=2)
    torch.testing.assert_close(block(x), out + shortcut)
    order = [name for name, _ in block.named_children()]
    assert order[:6] == ['bn1', 'conv1', 'bn2', 'conv2', 'bn3', 'conv3']  # CBN looks for the convolution before it


def official_v2_state(depth_blocks, using_bn=True):
    """Shapes of the checkpoints of switchable norm's ResNet v2, written down from its model."""
    state = {}

    def add_norm(name, channels):
        state.update({f'{name}.{key}': (1, channels, 1, 1) for key in ('weight', 'bias')})
        state.update({f'{name}.{key}': (3,) for key in ('mean_weight', 'var_weight')})
        state.update({f'{name}.{key}': (1, channels, 1) for key in ('running_mean', 'running_var')})

    state['conv1.weight'] = (64, 3, 7, 7)
    add_norm('sn1', 64)
    channels = 64
    for stage, blocks in enumerate(depth_blocks):
        width = 64 * 2**stage
        for i in range(blocks):
            block = f'layer{stage + 1}.{i}'
            add_norm(f'{block}.sn1', channels)
            add_norm(f'{block}.sn2', width)
            add_norm(f'{block}.sn3', width)
            state[f'{block}.conv1.weight'] = (width, channels, 1, 1)
            state[f'{block}.conv2.weight'] = (width, width, 3, 3)
            state[f'{block}.conv3.weight'] = (4 * width, width, 1, 1)
            if i == 0:
                state[f'{block}.downsample.weight'] = (4 * width, channels, 1, 1)
            channels = 4 * width
    add_norm('sn_out', channels)
    return {key: torch.randn(shape).abs() for key, shape in state.items()}


@pytest.mark.parametrize('depth, blocks', [(50, R50), (101, R101)])
def test_resnet_v2_reads_official_switchable_norm_files(depth, blocks):
    model = ResNetV2(depth, norm_cfg=dict(type='SN'))
    state = official_v2_state(blocks)
    missing, unexpected = model.load_state_dict(dict(state), strict=False)
    assert not unexpected and all(key.endswith('num_batches_tracked') for key in missing)
    for key, value in model.state_dict().items():
        if key in state:
            torch.testing.assert_close(value.flatten(), state[key].flatten())
    model.train()
    (y,) = model(torch.randn(2, 3, 64, 64))
    assert tuple(y.shape) == (2, 2048, 2, 2) and y.min() == 0  # norm and ReLU at the end


def test_resnet_v2_starts_with_all_branches_on():
    model = ResNetV2(50, norm_cfg=dict(type='SN'))
    model.init_weights()
    assert all(float(block.sn3.weight.min()) == 1 for block in model.layer1)


# -------------------------------------------------------------------------------------------------------------- configs


@functools.lru_cache(None)
def load(name):
    return Config.fromfile(REPO / f'configs/{name}.py')


@pytest.fixture
def build(monkeypatch):
    """Build a config's model, without random numbers, which nothing here looks at."""
    for layer in (nn.Conv2d, nn.Linear):
        monkeypatch.setattr(layer, 'reset_parameters', lambda self: None)

    def build_model(name):
        with DefaultScope.overwrite_default_scope('mmpretrain'):
            return MODELS.build(copy.deepcopy(load(name).model))

    return build_model


def blocks(norm, stages=R50, first=1):
    """Names of one norm in all blocks."""
    return [f'backbone.layer{i}.{j}.{norm}' for i, count in enumerate(stages, first) for j in range(count)]


def multiply_adds(model, size=224):
    """Millions of multiply-adds of convolutions, linear layers and BNET transforms; binary ones count 1/64."""
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


@pytest.mark.parametrize('name', [name for name in CONFIGS if name.endswith('_imagenet')])
def test_imagenet_model(build, name):
    printed, norms, where = EXPECTED[name.removesuffix('_imagenet')]
    model = build(name)
    bnets = {name: layer for name, layer in model.named_modules() if isinstance(layer, BNET)}
    assert set(bnets) == set(where)
    inside = tuple(f'{name}.' for name, layer in model.named_modules() if isinstance(layer, (BNET, bnet_mm.BNConv)))
    found = [
        name for name, layer in model.named_modules() if isinstance(layer, NORMS) and not name.startswith(inside or '/')
    ]
    assert len(bnets) + len(found) == norms
    if match := re.search(r'bnet(\d)', name):
        assert {layer.bnconv.k for layer in bnets.values()} == {int(match[1])}
    assert {layer.bnconv.dilation for layer in bnets.values()} <= {2 if 'dilated2' in name else 1}
    if printed:
        assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == printed


@pytest.mark.parametrize('kind', ['bn', 'bnet3'])
@pytest.mark.parametrize('network', list(IMAGENETTE))
def test_imagenette_model(build, network, kind):
    model = build(f'{network}_{kind}_imagenette')
    count = sum(isinstance(layer, BNET if kind == 'bnet3' else nn.BatchNorm2d) for layer in model.modules())
    assert count == IMAGENETTE[network] and model.head.fc.out_features == 10


def test_every_config_is_checked_and_has_its_baseline():
    assert {name.removesuffix('_imagenet') for name in CONFIGS if name.endswith('_imagenet')} == set(EXPECTED)
    for name in CONFIGS:
        if re.search(r'bnet|bnconv', name):
            plain = re.sub(r'_bnet3_(dilated2|a|b|abc|freeze)_', '_bn_', name)
            plain = re.sub(r'(gn|sn)_bnet\d', r'\1', plain)
            assert re.sub(r'bnet\d|bnconv\d', 'bn', plain) in CONFIGS
        imports = load(name).custom_imports['imports']
        assert imports[:2] == ['bnet_mm', 'bnet_mm.compat']  # compat before anything that imports torchvision


def test_enhanced_norms_are_gn_and_sn(build):
    for kind, norm in (('gn', nn.GroupNorm), ('sn', bnet_mm.norms.SN2d)):
        model = build(f'resnet50_{kind}_bnet3_imagenet')
        assert {type(layer.norm) for layer in model.modules() if isinstance(layer, BNET)} == {norm}
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


# ------------------------------------------------------------------------------------------------------------ schedules


def learning_rates(cfg, iterations=200):
    """The rate of the first iteration of every epoch and of the last iteration, by the config's own schedulers."""
    optimizer = OPTIMIZERS.build(dict(cfg.optim_wrapper.optimizer, params=[nn.Parameter(torch.zeros(1))]))
    schedulers = cfg.param_scheduler if isinstance(cfg.param_scheduler, list) else [cfg.param_scheduler]
    by_iteration, by_epoch = [], []
    for options in map(dict, schedulers):
        options.pop('_scope_', None)
        kind = PARAM_SCHEDULERS.get(options.pop('type'))
        if options.pop('convert_to_iter_based', False):
            by_iteration.append(kind.build_iter_from_epoch(optimizer, **options, epoch_length=iterations))
        else:
            by_epoch.append(kind(optimizer, **options))
    rates = []
    for _ in range(cfg.train_cfg.max_epochs):
        rates.append(optimizer.param_groups[0]['lr'])
        optimizer.step()  # what torch wants to see before a scheduler steps
        for _ in range(iterations if by_iteration else 1):
            last = optimizer.param_groups[0]['lr']
            for scheduler in by_iteration:
                scheduler.step()
        for scheduler in by_epoch:
            scheduler.step()
    return rates, last


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
    every, last = learning_rates(cfg)
    assert every == pytest.approx(rates, rel=2e-3, abs=1e-6)
    if cfg.train_cfg.max_epochs in (120, 150):  # cosine down to zero, by iteration
        assert last < 1e-6
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
    every, _ = learning_rates(cfg)
    assert every == pytest.approx([0.01 * (1 + math.cos(math.pi * t / 4)) / 2 for t in (0, 0, 1, 2, 3)])
    assert cfg.train_dataloader.batch_size == 32
    assert cfg.train_dataloader.dataset.data_root == 'data/imagenette2'


# ------------------------------------------------------------------------------------------------- FreezeTransform, use


class Toy(BaseModel):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = BNET(4, k=3)
        self.head = nn.Conv2d(4, 1, 3)

    def forward(self, x, mode='loss'):
        return dict(loss=self.head(self.bn(self.conv(x))).square().mean())


def run(work_dir, epochs, **options):
    data = [dict(x=image) for image in torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))]
    states = []

    class Record(FreezeTransform):
        def after_train_epoch(self, runner):
            model = getattr(runner.model, 'module', runner.model)
            states.append({key: value.clone() for key, value in model.state_dict().items()})

    runner = Runner(
        Toy(),
        str(work_dir),
        train_dataloader=dict(
            batch_size=2,
            dataset=data,
            sampler=dict(type='DefaultSampler', shuffle=False),
            collate_fn=dict(type='default_collate'),
            num_workers=0,
        ),
        train_cfg=dict(by_epoch=True, max_epochs=epochs),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.05, momentum=0.9, weight_decay=1e-2)),
        custom_hooks=[Record(epoch=1)],
        default_hooks=dict(logger=None, runtime_info=None),
        experiment_name=f'freeze{work_dir.name}{epochs}{len(options)}',
        **options,
    )
    runner.train()
    return states


def moved(old, new, part):
    return {not torch.equal(value, new[key]) for key, value in old.items() if key.startswith(part)}


def test_freeze_transform(tmp_path):
    states = run(tmp_path, 5)
    for epoch in range(1, 5):  # epochs 0 and 1 train the transform
        before, after = states[epoch - 1], states[epoch]
        assert moved(before, after, 'bn.bnconv') == {epoch <= 1}
        assert moved(before, after, 'bn.norm') == moved(before, after, 'head') == {True}
    resumed = run(tmp_path, 7, load_from=str(tmp_path / 'epoch_5.pth'), resume=True)
    assert len(resumed) == 2 and moved(states[-1], resumed[-1], 'bn.bnconv') == {False}
    assert moved(states[-1], resumed[-1], 'conv') == {True}


def test_freeze_transform_in_distributed_training(tmp_path, monkeypatch):
    for name in ('LOCAL_RANK', 'OMP_NUM_THREADS', 'MKL_NUM_THREADS'):  # mmengine reads the first, sets the others
        monkeypatch.setenv(name, '0' if name == 'LOCAL_RANK' else '1')
    dist.init_process_group('gloo', init_method=f'file://{tmp_path}/rendezvous', rank=0, world_size=1)
    try:
        wrapper = dict(type='MMDistributedDataParallel', device_ids=None)
        wrapped = dict(cfg=dict(model_wrapper_cfg=dict(wrapper, find_unused_parameters=True)))
        states = run(tmp_path, 3, launcher='pytorch', **wrapped)
        assert moved(states[1], states[2], 'bn.bnconv') == {False} and moved(states[0], states[1], 'bn.bnconv') == {
            True
        }
        wrapped['cfg']['model_wrapper_cfg']['find_unused_parameters'] = False
        with pytest.raises(ValueError, match='find_unused_parameters = True'):
            run(tmp_path, 3, launcher='pytorch', **wrapped)
    finally:
        dist.destroy_process_group()


def test_freeze_transform_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match='epoch must be a positive integer, got 0'):
        FreezeTransform(epoch=0)
    runner = type('Runner', (), dict(model=nn.Conv2d(3, 3, 1)))
    with pytest.raises(ValueError, match='no BNET'):
        FreezeTransform(epoch=1).before_train(runner)


def test_readme_command_makes_a_backbone_for_detectors(tmp_path, monkeypatch, build):
    """The command of configs/README.md, on a checkpoint of resnet50_bnet5_imagenet.py, for mmdet's ResNet."""
    pytest.importorskip('mmdet.models')
    code = re.search(r'^python -c "(.+?)" ', (REPO / 'configs/README.md').read_text(), re.M | re.S)[1]
    trained = build('resnet50_bnet5_imagenet')
    for p in trained.parameters():
        nn.init.normal_(p)
    torch.save(dict(state_dict=trained.state_dict()), tmp_path / 'epoch_100.pth')
    target = tmp_path / 'R50_BNET-5.pth'
    monkeypatch.setattr(sys, 'argv', ['-c', str(tmp_path / 'epoch_100.pth'), str(target)])
    exec(code, {})
    init = dict(type='Pretrained', checkpoint=str(target))
    with DefaultScope.overwrite_default_scope('mmdet'):
        detector = MODELS.build(dict(type='WithBNET', base='ResNet', bnet=dict(k=5), depth=50, init_cfg=init))
        detector.init_weights()
    expected = trained.backbone.state_dict()
    assert expected.keys() == detector.state_dict().keys()
    assert all(torch.equal(value, expected[key]) for key, value in detector.state_dict().items())
