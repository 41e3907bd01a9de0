"""What the OpenMMLab host does to norm layers, and that BNET survives each of it."""

import copy

import pytest
import torch
from mmcv.cnn import ConvModule, build_norm_layer, fuse_conv_bn
from mmengine.model import convert_sync_batchnorm, revert_sync_batchnorm
from mmengine.model.efficient_conv_bn_eval import turn_on_efficient_conv_bn_eval
from mmengine.optim import DefaultOptimWrapperConstructor
from mmengine.registry import MODELS, DefaultScope
from torch import nn

import bnet_mm
from bnet_mm import BNET
from bnet_mm.layers.sync_batch_norm import SyncBatchNorm
from helpers import reference
from helpers.hosts import import_host_models

NORM = dict(type='BNET', k=3)
RESNETS = [('mmdet', 50), ('mmseg', 50), ('mmpretrain', 50), ('mmaction', 50), ('mmdet', 18), ('mmaction', 18)]


@pytest.fixture
def build():
    """build(scope, cfg): a model of one of the four libraries, as its runner would build it."""

    def build_in_scope(scope, cfg):
        import_host_models(scope)
        with DefaultScope.overwrite_default_scope(scope):
            return MODELS.build(cfg)

    return build_in_scope


def layers_of(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, BNET)}


def is_identity(layer):
    k = layer.bnconv.k
    want = torch.zeros_like(layer.bnconv.weight)
    want[:, 0, k // 2, k // 2] = 1
    return torch.equal(layer.bnconv.weight, want) and not layer.bnconv.bias.any()


def is_zero(layer):
    return not layer.bnconv.weight.any() and not layer.bnconv.bias.any()


@pytest.mark.parametrize('scope', ['mmengine', 'mmdet', 'mmseg', 'mmpretrain', 'mmaction'])
def test_found_from_every_scope(scope):
    import_host_models(scope)
    with DefaultScope.overwrite_default_scope(scope):
        name, layer = build_norm_layer(dict(NORM, requires_grad=False, eps=1e-3), 8, postfix=3)
    assert name == 'bn3' and isinstance(layer, BNET) and layer.norm.eps == 1e-3
    assert not any(p.requires_grad for p in layer.parameters())
    assert all(p.requires_grad for p in build_norm_layer(NORM, 8)[1].parameters())


@pytest.mark.parametrize('scope, depth', RESNETS)
def test_default_init_leaves_the_identity_start(build, scope, depth):
    model = build(scope, dict(type='ResNet', depth=depth, norm_cfg=NORM, **no_zero_init(scope)))
    model.init_weights()
    layers = layers_of(model)
    assert len(layers) == {50: 53, 18: 20}[depth]
    assert all(is_identity(layer) for layer in layers.values())


def no_zero_init(scope):
    return {} if scope == 'mmaction' else dict(zero_init_residual=False)


@pytest.mark.parametrize('scope, kind, depth, last', [
    ('mmdet', 'ResNet', 50, 'bn3'), ('mmdet', 'ResNet', 18, 'bn2'), ('mmseg', 'ResNet', 50, 'bn3'),
    ('mmpretrain', 'ResNet', 50, 'bn3'),
])  # fmt: skip
def test_zero_init_residual_zeroes_the_last_norm(build, scope, kind, depth, last):
    model = build(scope, dict(type=kind, depth=depth, norm_cfg=NORM, zero_init_residual=True))
    model.init_weights()
    for name, layer in layers_of(model).items():
        assert is_zero(layer) if name.endswith(last) else is_identity(layer), name


@pytest.mark.parametrize('kind, extra', [('ResNet', {}), ('ResNeXt', dict(groups=32, base_width=4))])
@pytest.mark.parametrize('zero', [True, False])
def test_zero_init_residual_through_with_bnet(build, kind, extra, zero):
    """mmdet's ResNeXt ignores the option for BN; WithBNET makes it reach the BNET layers."""
    cfg = dict(type='WithBNET', base=kind, bnet=dict(), depth=50, zero_init_residual=zero, **extra)
    model = build('mmdet', cfg)
    model.init_weights()
    layers = layers_of(model)
    assert len(layers) == 16
    assert all(is_zero(layer) if zero else is_identity(layer) for layer in layers.values())


@pytest.mark.parametrize('cfg', [
    dict(type='ResNet', norm_cfg=NORM), dict(type='WithBNET', base='ResNet', bnet=dict(k=3)),
])  # fmt: skip
def test_norm_eval_and_frozen_stages(build, cfg):
    """Statistics of all norms freeze; the transform trains except in the frozen stages, also after train()."""
    model = build('mmdet', dict(cfg, depth=50, norm_eval=True, frozen_stages=1))
    for _ in range(2):
        for name, layer in layers_of(model).items():
            frozen = name.startswith(('bn1', 'layer1'))
            assert all(p.requires_grad != frozen for p in layer.parameters()), name
        model.train()
    assert not any(layer.norm.training for layer in layers_of(model).values())
    before = copy.deepcopy({name: layer.norm.state_dict() for name, layer in layers_of(model).items()})
    reference.randomise_parameters(model)
    sum(y.square().mean() for y in model(torch.randn(2, 3, 64, 64))).backward()
    for name, layer in layers_of(model).items():
        assert all(torch.equal(before[name][key], value) for key, value in layer.norm.state_dict().items())
        gradient = layer.bnconv.weight.grad
        assert gradient is None if name.startswith(('bn1', 'layer1')) else gradient.abs().max() > 0, name


def small_net(norm=NORM):
    net = nn.Sequential(
        ConvModule(3, 6, 3, padding=1, norm_cfg=norm), ConvModule(6, 5, 3, stride=2, norm_cfg=dict(type='BN'))
    )
    return reference.randomise(net)


def test_conv_module_constructor_keeps_the_identity():
    module = ConvModule(3, 6, 3, norm_cfg=NORM)
    assert module.norm_name == 'bn' and is_identity(module.bn)
    module.init_weights()
    assert is_identity(module.bn)


@pytest.mark.parametrize('implementation', ['torch', 'mmengine', 'layer itself'])
def test_sync_bn_conversion_and_reversion_keep_the_transform(implementation):
    """torch's conversion, the runner's sync_bn='torch', and mmengine's reversion before a single-process run."""
    net = small_net().eval()
    x = torch.randn(2, 3, 8, 9)
    want, keys = net(x), list(net.state_dict())
    if implementation == 'torch':
        converted = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(net))
    elif implementation == 'mmengine':
        converted = convert_sync_batchnorm(copy.deepcopy(net), 'torch')
    else:
        converted = nn.Sequential(nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(net[0].bn)))
        x, want, keys = torch.randn(2, 6, 5, 5), None, None
        want = net[0].bn(x)
    inner = [m.norm for m in converted.modules() if isinstance(m, BNET)]
    assert len(inner) == 1 and isinstance(inner[0], SyncBatchNorm)
    converted.eval()  # mmengine's conversion forgets the mode, of plain BN as well
    torch.testing.assert_close(converted(x), want)
    reverted = revert_sync_batchnorm(converted)
    assert not any(isinstance(m, nn.SyncBatchNorm) for m in reverted.modules())
    torch.testing.assert_close(reverted(x), want)
    if keys:
        assert list(reverted.state_dict()) == keys
    reverted.train()(x)  # the reverted statistics run on a CPU


def test_sync_bn_norms_become_bnet_over_sync_bn():
    block = nn.Sequential(nn.Conv2d(3, 4, 1), nn.SyncBatchNorm(4))
    bnet_mm.enhance(block, k=3, where='all')
    assert isinstance(block[1], BNET) and isinstance(block[1].norm, SyncBatchNorm) and not block[1].norm.affine


def test_fuse_conv_bn_keeps_the_function():
    net = small_net().eval()
    x = torch.randn(2, 3, 8, 9)
    want = net(x)
    fused = fuse_conv_bn(copy.deepcopy(net))
    torch.testing.assert_close(fused(x), want)
    assert isinstance(fused[0].bn, BNET) and isinstance(fused[1].bn, nn.Identity)


@pytest.mark.parametrize('where', ['A', 'B', 'C', 'ABC', 'all'])
def test_fuse_conv_bn_of_a_whole_backbone(build, where):
    cfg = dict(type='WithBNET', base='ResNet', bnet=dict(k=3, where=where), depth=50, base_channels=8, stem_channels=8)
    model = reference.randomise(build('mmdet', cfg))
    model.eval()
    x = torch.randn(1, 3, 64, 70)
    want = model(x)
    for got, expected in zip(fuse_conv_bn(copy.deepcopy(model))(x), want):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


def test_efficient_conv_bn_eval_keeps_the_function():
    """ConvModule's option and mmengine's torch.fx pass, which has to trace through the layer."""
    net = small_net().eval()
    x = torch.randn(2, 3, 8, 9)
    want = net(x)
    with_option = copy.deepcopy(net)
    for module in with_option:
        module.turn_on_efficient_conv_bn_eval(True)
    torch.testing.assert_close(with_option(x), want)

    plain = reference.randomise(nn.Sequential(nn.Conv2d(3, 6, 3), BNET(6, k=3), nn.Conv2d(6, 4, 1), nn.BatchNorm2d(4)))
    plain.eval()
    want = plain(x)
    traced = nn.ModuleList([copy.deepcopy(plain)])
    turn_on_efficient_conv_bn_eval(traced, '0')
    torch.testing.assert_close(traced[0](x), want)


def test_paramwise_cfg_reaches_the_transform_by_name():
    """Documented way: custom_keys 'bnconv'. norm_decay_mult covers host norms only, bias_decay_mult also our bias."""
    net = nn.Sequential(nn.Conv2d(3, 4, 1), BNET(4, k=3), nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4))

    def decay(**paramwise):
        wrapper = dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=1.0, weight_decay=1.0))
        groups = DefaultOptimWrapperConstructor(wrapper, paramwise)(net).optimizer.param_groups
        of = {id(p): group['weight_decay'] for group in groups for p in group['params']}
        return {name: of[id(p)] for name, p in net.named_parameters()}

    by_name = decay(custom_keys={'bnconv': dict(decay_mult=0.0)})
    assert {name for name, value in by_name.items() if value == 0} == {'1.bnconv.weight', '1.bnconv.bias'}
    by_norm = decay(norm_decay_mult=0.0)
    assert {name for name, value in by_norm.items() if value == 0} == {'3.weight', '3.bias'}
    assert decay(bias_decay_mult=0.0)['1.bnconv.bias'] == 0


def test_hosts_may_write_to_every_batch_norm():
    """PIDNet, CenterNet, Conformer fill the weight of every BatchNorm2d, partial_bn freezes it; BNET's has none."""
    layer = reference.randomise(BNET(4, k=3)).eval()
    twin, x = copy.deepcopy(layer), torch.randn(2, 4, 5, 6)
    for module in layer.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.constant_(module.weight, 0)
            nn.init.constant_(module.bias, 7)
            module.weight.requires_grad = module.bias.requires_grad = False
    assert isinstance(layer.norm, nn.BatchNorm2d) and torch.equal(layer(x), twin(x))
    assert list(layer.state_dict()) == list(twin.state_dict()) and all(p.requires_grad for p in layer.parameters())
    traced = torch.fx.symbolic_trace(nn.Sequential(layer.train()))
    layer.eval()
    torch.testing.assert_close(traced(x), twin(x))  # the training flag is not part of the trace


def test_mmactions_own_reader_of_torchvision_files(tmp_path):
    """Its ResNet copies tensor by tensor; through WithBNET a BN file fills BNET as everywhere else."""
    import_host_models('mmaction')
    with DefaultScope.overwrite_default_scope('mmaction'):
        plain = reference.randomise(MODELS.build(dict(type='ResNet', depth=18)))
        official = {}
        for key, value in plain.state_dict().items():
            for i in (1, 2):
                key = key.replace(f'conv{i}.conv.', f'conv{i}.').replace(f'conv{i}.bn.', f'bn{i}.')
            official[key.replace('downsample.conv.', 'downsample.0.').replace('downsample.bn.', 'downsample.1.')] = (
                value
            )
        torch.save(official, tmp_path / 'resnet18.pth')
        cfg = dict(type='WithBNET', base='ResNet', bnet=dict(k=3), depth=18, pretrained=str(tmp_path / 'resnet18.pth'))
        model = MODELS.build(cfg)
    model.init_weights()
    assert isinstance(model.layer1[0].conv2.bn, BNET)
    x = torch.randn(1, 3, 32, 32)
    plain.eval(), model.eval()
    torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-4)
    del official['layer1.0.bn2.weight']
    torch.save(official, tmp_path / 'resnet18.pth')
    with pytest.raises(RuntimeError, match='bnconv.weight'):
        model.init_weights()
