"""fold(): equal to the unfolded model on every pixel, and silent about nothing."""

import copy

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from torch import nn

import bnet_mm
from bnet_mm import BNET, CBN, FReLU, SN2d
from bnet_mm.layers.bnet import DepthwiseTransform
from bnet_mm.surgery.fold import _same
from helpers import reference
from helpers.hosts import import_host_models
from helpers.paths import REPO

DOUBLE = {'dtype': torch.float64}


def randomised(net):
    return reference.randomise(net).double().eval()


def assert_folds(net, x, kept=()):
    """Equal to an untouched copy; nothing but ``kept`` is left; the report names every norm."""
    norms = {name for name, m in net.named_modules() if isinstance(m, nn.BatchNorm2d)}
    twin = copy.deepcopy(net)
    report = bnet_mm.fold(net)
    assert set(report.kept) == set(kept), str(report)
    left = {name for name, m in net.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert len(norms) == len(left) + len(report.changed) and left <= {*kept, *(f'{name}.norm' for name in kept)}
    with torch.no_grad():
        got, want = net(x), twin(x)
    for one, two in zip(*((y if isinstance(y, (tuple, list)) else [y]) for y in (got, want))):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-9 * two.abs().max().item())
    return report


@pytest.mark.parametrize('k, dilation', [(1, 1), (3, 1), (5, 1), (7, 2)])
@pytest.mark.parametrize('conv', [
    nn.Conv2d(3, 6, 3, stride=2, padding=1), nn.Conv2d(3, 6, 1, bias=False), nn.ConvTranspose2d(3, 6, 2, stride=2),
    nn.Conv2d(3, 6, 3, groups=3, padding=1, padding_mode='reflect', bias=False),
])  # fmt: skip
def test_bnet(conv, k, dilation):
    """Border pixels too: maps smaller than the kernel's reach. k = 1 folds away, other kernels stay as one Conv2d."""
    net = randomised(nn.Sequential(copy.deepcopy(conv), BNET(6, k=k, dilation=dilation)))
    taps = net[1].bnconv.weight
    report = assert_folds(net, torch.randn(2, 3, 7, 6, **DOUBLE))
    if k == 1:
        assert type(net[1]) is nn.Identity
    else:
        assert type(net[1]) is DepthwiseTransform and net[1].weight is taps
        assert f'a {k} x {k} depthwise convolution left' in str(report)


def test_other_dimensions_and_linear():
    """3-D convolutions fold. BatchNorm1d may normalise another dimension than the one that a Linear has its rows in."""
    net = randomised(nn.Sequential(nn.Conv3d(3, 4, 2), nn.BatchNorm3d(4)))
    x = torch.randn(2, 3, 4, 5, 4, **DOUBLE)
    want = net(x)
    assert list(bnet_mm.fold(net).changed) == ['1'] and type(net[1]) is nn.Identity
    torch.testing.assert_close(net(x), want)
    for net in (
        nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)),
        nn.Sequential(nn.Conv1d(3, 4, 1), nn.BatchNorm1d(4)),
    ):
        report = bnet_mm.fold(randomised(net))
        assert not report.changed and 'before it is no 2-D or 3-D convolution' in report.kept['1']


def test_batch_norms_without_affine_and_other_normalisers():
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False), nn.Conv2d(4, 4, 3), CBN(4), nn.Conv2d(4, 4, 3),
        BNET(4, norm='SyncBN'), nn.Conv2d(4, 4, 1), nn.SyncBatchNorm(4), nn.Conv2d(4, 4, 1), nn.GroupNorm(2, 4),
        nn.Conv2d(4, 4, 1), BNET(4, norm='IN'), nn.Conv2d(4, 4, 1), SN2d(4),
        nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, track_running_stats=False),
    )  # fmt: skip
    report = bnet_mm.fold(copy.deepcopy(randomised(net)))
    assert set(report.changed) == {'1', '3', '5', '7'}
    x = torch.randn(2, 3, 12, 13, **DOUBLE)
    torch.testing.assert_close(report.model(x), net(x))
    assert report.kept == {
        '9': 'GroupNorm takes statistics from its input',
        '11': 'AffineFreeInstanceNorm2d takes statistics from its input',
        '13': 'SN2d takes statistics from its input',
        '15': 'BatchNorm2d tracks no running statistics',
    }
    assert 'not folded (1), GroupNorm takes statistics from its input:\n  9' in str(report)


def test_frelu_and_copy():
    net = randomised(nn.Sequential(nn.Conv2d(3, 4, 3), BNET(4), FReLU(4)))
    before, x = copy.deepcopy(net.state_dict()), torch.randn(1, 3, 8, 9, **DOUBLE)
    report = bnet_mm.fold(net, inplace=False)
    assert not report.kept and type(report.model[2].bn) is nn.Identity
    torch.testing.assert_close(report.model(x), net(x))
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items()) and BNET is type(net[1])


class Other(nn.Module):
    """conv and bn side by side, used in the given way."""

    def __init__(self, how):
        super().__init__()
        self.how, self.conv, self.bn = how, nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.gamma = nn.Parameter(torch.zeros(4, 1, 1))
        if how == 'two inputs':
            self.forward = lambda x, skip=None: self.bn(self.conv(x) + skip)

    def forward(self, x):
        if self.how == 'after':
            return self.bn(self.conv(x))
        if self.how == 'before':
            return self.conv(self.bn(x))
        if self.how == 'relu between':
            return self.bn(self.conv(x).relu())
        if self.how == 'both':
            y = self.conv(x)
            return y + self.bn(y)
        if self.how == 'both, one times 0':
            y = self.conv(x)
            return self.gamma * y + self.bn(y)
        if self.how == 'twice':
            return self.bn(self.conv(self.bn(self.conv(x))))
        if self.how == 'small branch':
            return x + 1e-3 * self.bn(self.conv(x).relu())
        if self.how == 'dead in the trial':
            return (self.bn(self.conv(x) ** 2) - 1e4).relu()
        if self.how == 'nothing':
            return self.bn(self.conv(x))[:, :, :0]
        return {'y': self.bn(self.conv(x))}


@pytest.mark.parametrize('how, message', [
    ('after', ''), ('before', 'does not apply it directly'), ('relu between', 'does not apply it directly'),
    ('both', 'uses the convolution besides it'), ('both, one times 0', 'uses the convolution besides it'),
    ('twice', 'does not apply it directly'),
    ('small branch', 'does not apply it directly'), ('dead in the trial', 'does not apply it directly'),
    ('two inputs', 'does not take one map alone'), ('dict', 'cannot be tried'), ('nothing', 'cannot be tried'),
])  # fmt: skip
def test_unknown_modules_are_tried(how, message):
    """Registered next to each other is not yet used one after the other; what differs is undone and reported."""
    net = randomised(Other(how))
    nn.init.zeros_(net.gamma)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    generator = torch.random.get_rng_state()
    report = bnet_mm.fold(net)
    assert torch.equal(generator, torch.random.get_rng_state())
    if not message:
        assert list(report.changed) == ['bn'] and not report.kept
        return
    assert list(report.kept) == ['bn'] and message in report.kept['bn'] and 'Other' in report.kept['bn']
    assert type(net.bn) is nn.BatchNorm2d
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


class Activated(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).relu()


def test_what_cannot_be_folded_is_said():
    shared, hooked = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
    hooked.register_forward_hook(lambda module, inputs, output: output * 2)
    tied = nn.Conv2d(4, 4, 1)
    tied.weight = shared.weight
    normalised = nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1))
    net = nn.Sequential(
        nn.Sequential(shared, nn.BatchNorm2d(4)), nn.Sequential(shared, nn.BatchNorm2d(4)),
        nn.Sequential(tied, nn.BatchNorm2d(4)), nn.Sequential(hooked, nn.BatchNorm2d(4)),
        nn.Sequential(normalised, nn.BatchNorm2d(4)), nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4)),
        nn.Sequential(nn.Conv2d(4, 4, 1), Activated(4)),
    )  # fmt: skip
    net = randomised(net)
    x = torch.randn(2, 4, 5, 5, **DOUBLE)
    want = net(x)
    report = bnet_mm.fold(net)
    assert torch.equal(net(x), want) and not report.changed
    several, hooks = 'used in several places', 'hooks or a parametrization'
    parts = [several, several, several, hooks, hooks, 'no convolution directly before it', 'forward of its own']
    assert len(report.kept) == len(parts) == 7
    for (name, reason), part in zip(report.kept.items(), parts, strict=True):
        assert part in reason, name


def test_conv_modules_with_other_convolutions():
    """A convolution of mmcv's own is tried; weight standardisation undoes a scale, so that its norm stays."""
    mmcv = pytest.importorskip('mmcv.cnn')
    for cfg, folds in [(dict(type='Conv2dAdaptivePadding'), True), (dict(type='ConvAWS'), False)]:
        net = mmcv.ConvModule(3, 4, 3, stride=2, conv_cfg=cfg, norm_cfg=dict(type='BNET', k=3))
        net = randomised(net)
        x = torch.randn(2, 3, 9, 9, **DOUBLE)
        want = net(x)
        assert bool(bnet_mm.fold(net).changed) == folds
        torch.testing.assert_close(net(x), want)


def test_hooks_inside_bnet_are_kept():
    net = randomised(nn.Sequential(nn.Conv2d(3, 4, 1), BNET(4), nn.Conv2d(4, 4, 1), BNET(4)))
    net[1].norm.register_forward_hook(lambda module, inputs, output: output * 2)
    nn.utils.parametrizations.weight_norm(net[3].bnconv)
    x = torch.randn(2, 3, 5, 5, **DOUBLE)
    want = net(x)
    report = bnet_mm.fold(net)
    assert set(report.kept) == {'1', '3'} and torch.equal(net(x), want)


class Peeking(nn.Module):
    """Holds a sequence, and looks inside."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))

    def forward(self, x):
        return self.layers(x) + self.layers[0](x)


def test_inputs_show_what_no_module_tells():
    """Sequential and ConvModule are taken at their word; with inputs the whole model is compared."""
    x = torch.randn(2, 3, 5, 5, **DOUBLE)
    with pytest.raises(ValueError, match='does not compute the same on inputs'):
        bnet_mm.fold(randomised(Peeking()), inputs=(x,), inplace=False)
    peeking = randomised(Peeking())
    before, parts = copy.deepcopy(peeking.state_dict()), list(peeking.modules())
    with pytest.raises(ValueError, match='does not compute the same on inputs'):
        bnet_mm.fold(peeking, inputs=(x,))
    assert list(peeking.modules()) == parts  # as it was
    assert all(torch.equal(before[name], value) for name, value in peeking.state_dict().items())
    net = randomised(nn.Sequential(Peeking().layers, BNET(4)))
    want = net(x)
    copied = bnet_mm.fold(net, inputs=(x,), inplace=False)
    assert copied.model is not net and isinstance(net[1], BNET)
    torch.testing.assert_close(copied.model(x), want)
    report = bnet_mm.fold(net, inputs=(x,))
    assert report.model is net and list(report.changed) == list(copied.changed) == ['0.1']
    torch.testing.assert_close(net(x), want)


def test_training_mode_is_refused():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    with pytest.raises(ValueError, match='must be in evaluation mode, call eval.*it is in training mode'):
        bnet_mm.fold(net)
    net.eval()[1].train()
    with pytest.raises(ValueError, match='1 is in training mode'):
        bnet_mm.fold(net)
    assert type(net[1]) is nn.BatchNorm2d


BACKBONES = [
    ('mmdet', dict(type='ResNet', depth=50, base_channels=16, stem_channels=16), 'ABC'),
    ('mmdet', dict(type='ResNeXt', depth=50, groups=4, base_width=4, base_channels=16, stem_channels=16), 'C'),
    ('mmdet', dict(type='Res2Net', depth=50, scales=4, base_width=8, base_channels=16, stem_channels=16), 'C'),
    ('mmpretrain', dict(type='ResNeSt', depth=50), 'C'),
    ('mmseg', dict(type='ResNetV1c', depth=18), 'all'),
    ('mmseg', dict(type='MobileNetV2'), 'A'),
    ('mmdet', dict(type='CSPDarknet'), 'C'),
    ('mmaction', dict(type='ResNet', depth=18), 'C'),
]


@pytest.mark.parametrize('scope, cfg, where', BACKBONES, ids=lambda value: value if isinstance(value, str) else None)
def test_backbones(scope, cfg, where):
    """Every norm is found, whatever way the host writes its blocks."""
    import_host_models(scope)
    with DefaultScope.overwrite_default_scope(scope):
        net = MODELS.build(cfg)
    bnet_mm.enhance(net, k=3, where=where)
    assert_folds(randomised_for_depth(net), torch.randn(1, 3, 64, 96, **DOUBLE))


def randomised_for_depth(net):
    """As randomised(); a host's eval() returns None, and maps must not die out over a hundred layers."""
    reference.randomise(net).double()
    net.eval()
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight)
    return net


@pytest.mark.parametrize('scope, config, norms', [
    ('mmdet', 'faster_rcnn_r50_bnet5_1x', 53), ('mmseg', 'pspnet_r50_bnet3_40k_cityscapes', 53 + 4 + 1 + 1),
])  # fmt: skip
def test_models_of_this_project(scope, config, norms):
    """A detector and a segmentor, the latter over synchronised statistics: PSPNet's pyramid, bottleneck, auxiliary."""
    import_host_models(scope)
    cfg = Config.fromfile(f'{REPO}/configs/{config}.py').model
    cfg.backbone.update(init_cfg=None)
    with DefaultScope.overwrite_default_scope(scope):
        model = randomised_for_depth(MODELS.build(cfg))
    twin = copy.deepcopy(model)
    report = bnet_mm.fold(model)
    assert not report.kept and len(report.changed) == norms
    x = torch.randn(1, 3, 64, 96, **DOUBLE)
    with torch.no_grad():
        got, want = model.extract_feat(x), twin.extract_feat(x)
        if scope == 'mmseg':
            got, want = (*got, model.decode_head(got)), (*want, twin.decode_head(want))
    for one, two in zip(got, want, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-9 * two.abs().max().item())


@pytest.mark.parametrize('dtype, tolerance', [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)])
def test_rounding(dtype, tolerance):
    """Folding is computed in float64: in the model's own precision only rounding remains."""
    net = reference.randomise(nn.Sequential(nn.Conv2d(3, 8, 3), BNET(8, k=5))).eval().to(dtype)
    x = torch.randn(2, 3, 12, 9, dtype=dtype)
    want = net(x)
    bnet_mm.fold(net)
    assert net[0].weight.dtype == net[0].bias.dtype == dtype
    assert (net(x) - want).abs().max() <= tolerance * want.abs().max()


class Refuses(nn.Module):
    def forward(self, x):
        raise RuntimeError('no trial, please')


def test_a_sequential_needs_no_trial():
    """What follows its convolution is known, whatever else is in it."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), Refuses()).eval()
    reference.randomise(model)
    bnet_mm.fold(model)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())


def test_same_outputs_have_the_same_shapes():
    """A map that only broadcasts to the other is another function."""
    assert _same([torch.ones(2, 3)], [torch.ones(2, 3)])
    assert not _same([torch.ones(2, 3)], [torch.ones(1, 3)])
    assert not _same([torch.ones(2, 3)], [torch.ones(2, 3), torch.ones(1)])
