"""enhance() beyond mmdet's ResNet, and restore(). Stock configs of all libraries: configs/test_stock.py."""

import copy
import importlib
import re

import pytest
import torch
from mmengine.model import ExponentialMovingAverage
from torch import nn

import bnet_mm
from bnet_mm import CBN, BNConv, FReLU, SN2d
from bnet_mm.layers.sync_batch_norm import SyncBatchNorm
from bnet_mm.surgery.enhance import insert_bn_conv
from helpers import reference
from helpers.nets import bnet_names, build, small_net

WHERE = [
    ('C', {'3.bn3', '4.bn3'}),
    ('BA', {'3.bn1', '3.bn2', '4.bn1', '4.bn2'}),
    ('all', {'1', *(f'{i}.bn{j}' for i in (3, 4) for j in (1, 2, 3))}),
    (r'^4\..*[12]$', {'4.bn1', '4.bn2'}),
    (re.compile('bn2'), {'3.bn2', '4.bn2'}),
    (lambda name, module: name.startswith('3') and module.num_features == 4, {'3.bn1', '3.bn2', '3.bn3'}),
]


@pytest.mark.parametrize(
    'where, names', WHERE, ids=lambda value: str(sorted(value) if isinstance(value, set) else value)[:12]
)
def test_where(where, names):
    """Letters, 'all', regular expressions, predicates; what is reported is what was done, and the function is kept."""
    net = small_net()
    twin, x = copy.deepcopy(net), torch.randn(2, 3, 9, 8)
    report = bnet_mm.enhance(net, k=5, where=where)
    everything = {'1', *(f'{i}.bn{j}' for i in (3, 4) for j in (1, 2, 3))}
    assert bnet_names(net) == set(report.changed) == names and report.model is net
    assert set(report.kept) == everything - names
    for mode in (True, False):
        torch.testing.assert_close(net.train(mode)(x), twin.train(mode)(x))
    text = str(report)
    assert text.startswith(f'enhanced {len(names)} of 7 norms of Sequential')
    assert all(f'  {name}: BatchNorm2d(4) -> BNET-5\n' in text + '\n' for name in names)
    assert len(names) == 7 or f'not enhanced ({7 - len(names)})' in text


def test_copy_leaves_the_model_alone():
    net = small_net()
    before = copy.deepcopy(net.state_dict())
    report = bnet_mm.enhance(net, k=3, inplace=False)
    assert not bnet_names(net) and bnet_names(report.model) == {'3.bn3', '4.bn3'}
    reference.randomise_parameters(report.model)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


@pytest.mark.parametrize('norm', [
    nn.BatchNorm2d, lambda c: nn.GroupNorm(2, c), lambda c: nn.InstanceNorm2d(c, affine=True), SN2d, CBN,
    nn.SyncBatchNorm, nn.InstanceNorm2d,
])  # fmt: skip
def test_every_norm(norm):
    """Also in double precision, in the norm's mode and with its requires_grad."""
    net = small_net(norm).double()
    net[4].bn3.eval()
    if net[3].bn3.weight is not None:
        net[3].bn3.weight.requires_grad_(False)
        net[3].bn3.bias.requires_grad_(False)
    twin = copy.deepcopy(net)
    bnet_mm.enhance(net, k=3)
    assert [net[i].bn3.norm.training for i in (3, 4)] == [True, False]
    if net[3].bn3.weight is not None and norm is not nn.InstanceNorm2d:
        assert not any(p.requires_grad for p in net[3].bn3.bnconv.parameters())
    x = torch.randn(2, 3, 7, 8, dtype=torch.float64)
    if norm is nn.SyncBatchNorm:
        assert isinstance(net[3].bn3.norm, SyncBatchNorm)
        net.eval(), twin.eval()  # torch's does not train on a CPU
    torch.testing.assert_close(net(x), twin(x))


def test_what_cannot_be_replaced_is_reported():
    class Scaled(nn.BatchNorm2d):
        def forward(self, x):
            return 2 * super().forward(x)

    net = nn.ModuleDict(dict(plain=nn.BatchNorm2d(4), scaled=Scaled(4), flat=nn.LayerNorm(4), cube=nn.BatchNorm3d(4)))
    report = bnet_mm.enhance(net, where='all')
    assert list(report.changed) == ['plain']
    assert set(report.kept) == {'scaled', 'flat', 'cube'} and type(net['scaled']) is Scaled
    assert 'Scaled is no norm that BNET can hold' in str(report)
    again = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match='BNET already; BatchNorm3d is no norm'):
        bnet_mm.enhance(net, where='all')
    with pytest.raises(ValueError, match="where='head', in|where='head' in ModuleDict, whose norms are plain, scaled"):
        bnet_mm.enhance(net, where='head')
    assert list(again) == list(net.state_dict())


def test_what_would_be_lost_is_left_alone():
    """Hooks, subclasses (frozen statistics), norms of other dimensions; requires_grad of weight and bias apart."""

    class Frozen(nn.BatchNorm2d):
        def train(self, mode=True):
            return super().train(False)

    net = nn.ModuleDict(
        dict(hooked=nn.BatchNorm2d(4), frozen=Frozen(4), cube=nn.Sequential(nn.Conv3d(3, 4, 1), nn.SyncBatchNorm(4)),
             ours=BNConv(4), funnel=FReLU(4), bias=nn.BatchNorm2d(4), sn=SN2d(4))
    )  # fmt: skip
    net['hooked'].register_forward_hook(lambda module, inputs, output: output * 2)
    net['bias'].bias.requires_grad_(False)
    net['sn'].mean_weight.requires_grad_(False)
    report = bnet_mm.enhance(net, where='all')
    assert set(report.changed) == {'bias', 'sn'} and set(report.kept) == {'hooked', 'frozen', 'cube.1'}
    assert [p.requires_grad for p in (net['bias'].bnconv.weight, net['bias'].bnconv.bias)] == [True, False]
    frozen = {name for name, p in net['sn'].named_parameters() if not p.requires_grad}
    assert frozen == {'norm.mean_weight'}
    double = nn.Sequential(nn.Conv2d(3, 4, 1), nn.InstanceNorm2d(4)).double()
    bnet_mm.enhance(double, where='all')
    assert double[1].bnconv.weight.dtype == torch.float64


def test_optimizer_ema_and_ddp_after_enhancing(tmp_path):
    net = small_net()
    bnet_mm.enhance(net, k=3)
    average = ExponentialMovingAverage(net, momentum=0.5)
    torch.distributed.init_process_group('gloo', init_method=f'file://{tmp_path}/group', rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(net)
        optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
        before = net[3].bn3.bnconv.weight.detach().clone()
        wrapped(torch.randn(2, 3, 8, 8)).square().mean().backward()
        optimizer.step()
    finally:
        torch.distributed.destroy_process_group()
    after = net[3].bn3.bnconv.weight.detach()
    assert (after != before).all()
    for _ in range(2):  # the first update copies
        average.update_parameters(net)
    torch.testing.assert_close(average.module[3].bn3.bnconv.weight, after)


def test_insert_bn_conv_says_what_it_did_and_its_own_name():
    net = small_net()
    net.append(nn.GroupNorm(2, 4))
    report = insert_bn_conv(net, k=5, where='^4|^5')
    assert set(report.changed) == {'4.bn1', '4.bn2', '4.bn3'} and report.kept['5'] == 'no BatchNorm2d'
    assert '  4.bn3: BatchNorm2d(4) -> BNConv-5' in str(report) and report.kept['1'] == "not at where='^4|^5'"
    assert {name for name, m in net.named_modules() if isinstance(m, BNConv)} == set(report.changed)
    before = list(net.modules())
    for where, k, message in [
        ('head', 3, "insert_bn_conv: no norm to replace at where='head' in Sequential, whose norms are 1, 3.bn1"),
        ('5', 3, "insert_bn_conv: no norm to replace at where='5' in Sequential: no BatchNorm2d"),
        ('(', 3, "insert_bn_conv: where='(' is no regular expression"),
        (3, 3, 'insert_bn_conv: where must be letters'),
        ('C', 4, 'BNConv: k must be a positive odd integer, got 4'),
    ]:
        with pytest.raises(ValueError, match=re.escape(message)):
            insert_bn_conv(net, k, where)
    assert list(net.modules()) == before


STAGES = [f'layer{i}.{j}' for i, n in enumerate((2, 2, 2, 2), 1) for j in range(n)]
HOST_FAMILIES = [
    ('mmaction', dict(type='ResNet', depth=18, norm_eval=False), 'C', {f'{b}.conv2.bn' for b in STAGES}),
    ('mmaction', dict(type='ResNet', depth=18, norm_eval=False), 'A', {f'{b}.conv1.bn' for b in STAGES}),
    ('mmdet', dict(type='Darknet', depth=53), 'A', 23),
    ('mmdet', dict(type='MobileNetV2'), 'A', 16),
    ('mmdet', dict(type='MobileNetV2'), 'B', 17),
    ('mmseg', dict(type='MobileNetV2'), 'A', 16),
    ('mmpretrain', dict(type='MobileNetV2', widen_factor=0.25), 'A', 16),
    ('mmpretrain', dict(type='MobileNetV2', widen_factor=0.25), 'C', 17),
    ('mmaction', dict(type='MobileNetV2', widen_factor=0.25), 'BC', 34),
    ('mmpretrain', dict(type='MobileNetV3', arch='small_075'), 'A', 10),
    ('mmdet', dict(type='Res2Net', depth=50, scales=4, base_width=8, base_channels=16), 'B', 48),
    ('mmdet', dict(type='Res2Net', depth=50, scales=4, base_width=8, base_channels=16), 'C', 16),
    ('mmpretrain', dict(type='ResNeSt', depth=50), 'B', 16),
    ('mmdet', dict(type='RegNet', arch='regnetx_400mf'), 'C', 22),
    ('mmpretrain', dict(type='SEResNet', depth=50), 'C', 16),
    ('mmseg', dict(type='ResNetV1c', depth=18), 'C', {f'{b}.bn2' for b in STAGES}),
]  # fmt: skip


@pytest.mark.parametrize('scope, cfg, where, names', HOST_FAMILIES, ids=lambda v: v if isinstance(v, str) else None)
def test_host_families(scope, cfg, where, names):
    """Names, or numbers of blocks from the papers' architecture tables. MobileNetV2's first has no expansion."""
    model = build(scope, cfg)
    assert all(p.requires_grad for p in model.parameters())
    before = {name: m.num_features for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    report = bnet_mm.enhance(model, k=3, where=where)
    assert (set(report.changed) if isinstance(names, set) else len(report.changed)) == names
    assert not any('downsample' in name or 'stem' in name for name in report.changed)
    if 'MobileNet' in cfg['type']:  # the expansion is what is wider than the block's output
        for name in report.changed:
            assert where != 'A' or not name.startswith(('conv1', 'conv2')) and before[name] >= 16


def import_or_skip(name):
    """torchvision and timm are no dependencies, and a torchvision for another torch raises more than ImportError."""
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError) as error:
        pytest.skip(f'{name}: {error}')


@pytest.mark.parametrize('library, name, where, number', [
    ('torchvision', 'resnet18', 'C', 8), ('torchvision', 'resnext50_32x4d', 'B', 16),
    ('torchvision', 'mobilenet_v2', 'A', 16), ('timm', 'resnet26', 'C', 8), ('timm', 'resnet50d', 'A', 16),
])  # fmt: skip
def test_torchvision_and_timm(library, name, where, number):
    if library == 'torchvision':
        net = getattr(import_or_skip('torchvision.models'), name)()
    else:
        net = import_or_skip('timm').create_model(name)
    net = reference.randomise(net).double().eval()
    twin, x = copy.deepcopy(net), torch.randn(1, 3, 64, 70, dtype=torch.float64)
    report = bnet_mm.enhance(net, k=3, where=where)
    assert len(report.changed) == number
    torch.testing.assert_close(net(x), twin(x))
    reference.randomise_parameters(net)
    want = net(x)
    folded = bnet_mm.fold(net)
    assert set(folded.kept) <= {'bn1'}  # after a deep stem, whose last convolution is in a sequence of its own
    torch.testing.assert_close(net(x), want)


@pytest.mark.parametrize('norm', [nn.BatchNorm2d, lambda c: nn.GroupNorm(2, c), SN2d, nn.SyncBatchNorm, CBN])
def test_restore_is_the_inverse(norm):
    net = small_net(norm)
    twin = copy.deepcopy(net)
    bnet_mm.enhance(net, k=3, where='all')
    report = bnet_mm.restore(net)
    assert len(report.changed) == 7 and 'BNET-3 -> ' in str(report)
    assert [type(m) for m in net.modules()] == [type(m) for m in twin.modules()]
    for (name, got), (other, want) in zip(net.state_dict().items(), twin.state_dict().items(), strict=True):
        assert name == other and torch.equal(got, want)
    x = torch.randn(2, 3, 7, 9)
    torch.testing.assert_close(net.eval()(x), twin.eval()(x))
    assert norm is not CBN or net[3].bn2._convolution[0] is net[3].conv2


def test_restore_with_k_1_after_training_and_refusal():
    net = small_net()
    bnet_mm.enhance(net, k=1, where='all')
    reference.randomise(net)
    x = torch.randn(2, 3, 7, 9)
    want = net.eval()(x)
    twin = bnet_mm.restore(net, inplace=False).model
    assert len(bnet_names(net)) == 7 and not bnet_names(twin)
    torch.testing.assert_close(twin(x), want)
    with pytest.raises(ValueError, match='Sequential has no BNET'):
        bnet_mm.restore(twin)
    bnet_mm.enhance(twin, k=3)
    with torch.no_grad():
        twin[4].bn3.bnconv.weight[2, 0, 0, 1] = 1e-7
    with pytest.raises(ValueError, match='1 BNET layers have taps off the centre, no norm has: 4.bn3'):
        bnet_mm.restore(twin)
    assert bnet_names(twin) == {'3.bn3', '4.bn3'}
