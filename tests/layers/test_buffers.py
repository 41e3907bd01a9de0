"""What torch's batch norm does with its statistics, every layer that keeps some does: BatchNorm2d is the measure."""

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, update_bn

from bnet_mm import BNET, CBN, BNConv, FReLU, SN1d, SN2d, SN3d, SyncSN, enhance
from helpers import reference

KINDS = {
    'BNET': lambda **o: BNET(4, k=3, **o),
    'BNET over SyncBN': lambda **o: BNET(4, k=3, norm='SyncBN', **o),
    'BNET over GN': lambda **o: BNET(4, k=3, norm=dict(type='GN', num_groups=2), **o),
    'BNET over IN': lambda **o: BNET(4, k=3, norm='IN', **o),
    'BNET over SN': lambda **o: BNET(4, k=3, norm='SN', **o),
    'BNET over SyncSN': lambda **o: BNET(4, k=3, norm='SyncSN', **o),
    'BNET over CBN': lambda **o: BNET(4, k=3, norm='CBN', **o),
    'SN': lambda **o: SN2d(4, **o),
    'SyncSN': lambda **o: SyncSN(4, **o),
    'CBN': lambda **o: CBN(4, **o),
    'FReLU': lambda **o: FReLU(4, **o),
    'BNConv': lambda **o: BNConv(4, **o),
}
TRACKING = [name for name in KINDS if not name.endswith(('GN', 'IN'))]


def batch_norms(layer):
    """The modules that hold the statistics, as tools of torch and the hosts look for them."""
    return [m for m in layer.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def maps(*shape):
    return torch.randn(*(shape or (3, 4, 5, 7))) * 2 + 1


@pytest.mark.parametrize('name', KINDS)
def test_to_empty_and_reset_is_a_new_layer(name):
    """The way out of the meta device: to_empty, then reset_parameters of every module."""
    with torch.device('meta'):
        layer = KINDS[name]()
    assert all(value.is_meta for value in layer.state_dict().values())
    layer = layer.to_empty(device='cpu')
    for value in [*layer.parameters(), *layer.buffers()]:
        value.data.fill_(7)
    for module in layer.modules():
        if hasattr(module, 'reset_parameters'):
            module.reset_parameters()
    fresh = KINDS[name]()
    for key, value in fresh.state_dict().items():
        if not (name in ('FReLU', 'BNConv') and key == 'conv.weight'):  # random
            assert torch.equal(layer.state_dict()[key], value), key


@pytest.mark.parametrize('name', TRACKING)
def test_reset_running_stats(name):
    layer = KINDS[name]()
    layer(maps())
    (norm,) = batch_norms(layer)
    assert norm.num_batches_tracked == 1 and norm.running_mean.abs().min() > 0
    norm.reset_running_stats()
    assert norm.num_batches_tracked == 0 and not norm.running_mean.any() and norm.running_var.eq(1).all()


@pytest.mark.parametrize('name', KINDS)
def test_assign_leaves_nothing_on_meta(name):
    source = KINDS[name]()
    source(maps())
    with torch.device('meta'):
        layer = KINDS[name]()
    state = {key: value.clone() for key, value in source.state_dict().items()}
    layer.load_state_dict(state, assign=True)
    left = [key for key, value in [*layer.named_parameters(), *layer.named_buffers()] if value.is_meta]
    assert not [key for key in left if key.rpartition('.')[2] not in ('weight', 'bias') or key in state]
    layer, source = layer.eval(), source.eval()
    x = maps()
    assert torch.equal(layer(x), source(x))


def test_assign_of_official_sn_has_a_counter():
    """The official files have none."""
    with torch.device('meta'):
        layer = SN2d(4)
    official = {'running_mean': torch.randn(1, 4, 1), 'running_var': torch.rand(1, 4, 1)}
    official |= {'weight': torch.rand(1, 4, 1, 1), 'bias': torch.rand(1, 4, 1, 1)}
    official |= {'mean_weight': torch.rand(3), 'var_weight': torch.rand(3)}
    layer.load_state_dict(official, assign=True)
    assert not [key for key, value in layer.state_dict().items() if value.is_meta]
    assert layer.bn.num_batches_tracked == 0
    layer.train()(maps())


@pytest.mark.parametrize('name', TRACKING)
def test_update_bn_recomputes_the_statistics(name):
    """torch's update_bn: the plain average over a loader, whatever was there before."""
    torch.manual_seed(1)
    batches = [maps() for _ in range(4)]
    used, fresh = (nn.Sequential(KINDS[name]()) for _ in range(2))
    fresh.load_state_dict(used.state_dict())
    for _ in range(3):
        used(maps() * 5)
    update_bn(batches, used)
    norms = batch_norms(used) + batch_norms(fresh)
    assert norms[0].num_batches_tracked == 4 and norms[0].momentum == 0.1
    norms[1].momentum = None
    for x in batches:
        fresh.train()(x)
    for value in ('running_mean', 'running_var'):
        torch.testing.assert_close(getattr(norms[0], value), getattr(norms[1], value))


@pytest.mark.parametrize('name', KINDS)
def test_averages_of_models_and_state_dicts(name):
    """SWA over parameters and buffers, and an average over state_dict(), as EMA hooks do it."""
    layer = reference.randomise(nn.Sequential(nn.Conv2d(4, 4, 3), KINDS[name]()))
    average = AveragedModel(layer, use_buffers=True)
    by_hand = copy.deepcopy(layer.state_dict())
    for _ in range(3):
        layer(maps(2, 4, 9, 9).requires_grad_()).sum().backward()
        average.update_parameters(layer)
        for key, value in layer.state_dict().items():
            if value.is_floating_point():
                by_hand[key].lerp_(value, 0.5)
    twin = copy.deepcopy(layer)
    twin.load_state_dict(by_hand)
    assert torch.equal(twin.state_dict()['0.weight'], by_hand['0.weight'])


# --- Statistics removed by hand


@pytest.mark.parametrize('kind', ['BN', 'SyncBN', 'CBN'])
@pytest.mark.parametrize('removed', [['num_batches_tracked'], ['running_mean', 'running_var'], 'all'])
@pytest.mark.parametrize('momentum', [0.1, None])
@pytest.mark.parametrize('fused', [True, False])
def test_removed_statistics(kind, removed, momentum, fused, monkeypatch):
    if not fused:
        monkeypatch.setenv('BNET_MM_BACKEND', 'reference')
    removed = ['num_batches_tracked', 'running_mean', 'running_var'] if removed == 'all' else removed
    bn = nn.BatchNorm2d(4, affine=False, momentum=momentum)
    layer = BNET(4, k=3, norm=kind, momentum=momentum)
    for norm in (bn, layer.norm):
        for name in removed:
            setattr(norm, name, None)
    reference.randomise(layer.bnconv)
    for training in (True, False):
        x = maps()
        want = layer.bnconv(bn.train(training)(x))
        torch.testing.assert_close(layer.train(training)(x), want, rtol=1e-4, atol=1e-4)
        for name, value in bn.named_buffers():
            torch.testing.assert_close(getattr(layer.norm, name), value)


@pytest.mark.parametrize('removed', [['num_batches_tracked'], ['running_mean', 'running_var']])
def test_enhance_keeps_removed_statistics_removed(removed):
    net = reference.randomise(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    for name in removed:
        setattr(net[1], name, None)
    enhanced = enhance(net, k=3, where='all', inplace=False).model
    for training in (True, False):
        x = torch.randn(2, 3, 9, 9)
        torch.testing.assert_close(enhanced.train(training)(x), net.train(training)(x), rtol=1e-4, atol=1e-5)
    assert all(getattr(enhanced[1].norm, name) is None for name in removed)
    assert all(getattr(enhanced[1].to_norm(), name) is None for name in removed)


# --- Construction


@pytest.mark.parametrize('kind', [BNET, SN1d, SN2d, SN3d, SyncSN, CBN, FReLU, BNConv])
def test_device_and_dtype(kind):
    layer = kind(4, device='cpu', dtype=torch.float64)
    assert {value.dtype for value in layer.state_dict().values() if value.is_floating_point()} == {torch.float64}
    skipped = torch.nn.utils.skip_init(kind, 4, dtype=torch.float64)
    assert {value.device.type for value in skipped.state_dict().values()} == {'cpu'}
    assert all(value.is_meta for value in kind(4, device='meta').parameters())


# --- Large constants


@pytest.mark.parametrize('value', [3e6, 3e9])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('name', [name for name in KINDS if name not in ('FReLU', 'BNConv')])
@pytest.mark.parametrize('fused', [True, False])
def test_constant_maps_become_zero(name, value, dtype, training, fused, monkeypatch):
    """The variance is 0, so that eps alone divides what torch's own operators leave; the kernels leave nothing."""
    if not fused:
        monkeypatch.setenv('BNET_MM_BACKEND', 'reference')
    layer = KINDS[name]()
    x = torch.full((2, 4, 6, 7), value, dtype=dtype)
    torchs = nn.BatchNorm2d(4, affine=False) if 'IN' not in name else nn.InstanceNorm2d(4)
    for norm in [*batch_norms(layer), torchs]:
        if norm.running_mean is not None:
            norm.running_mean.fill_(x.flatten()[0].float())
            norm.running_var.zero_()
    y = layer.train(training)(x)
    runs_torchs = name.endswith('CBN') or not (fused or 'SN' in name)
    assert y.abs().max() <= (torchs.train(training)(x).abs().max() if runs_torchs else 0)


@pytest.mark.parametrize('layer, shape', [(SN1d(4), (3, 4)), (SN3d(4), (2, 4, 3, 5, 5))])
def test_constant_vectors_and_volumes_become_zero(layer, shape):
    assert layer(torch.full(shape, 3e9)).abs().max() == 0


def test_cross_iteration_norm_of_constants():
    """With its own path, which a gradient of the input switches on."""
    net = nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), CBN(4))
    nn.init.zeros_(net[0].weight)
    for channel in range(4):
        net[0].weight.data[channel, channel] = 1
    for _ in range(3):
        assert net(torch.full((2, 4, 6, 7), 3e6, requires_grad=True)).abs().max() < 1e-2


# --- Hosts that write to every norm's weight


@pytest.mark.parametrize('name', [name for name in KINDS if name.startswith('BNET')])
def test_writing_to_the_normaliser_changes_nothing(name):
    layer = reference.randomise(KINDS[name]())
    twin = copy.deepcopy(layer)
    for module in layer.modules():
        if isinstance(module, (nn.modules.batchnorm._NormBase, nn.GroupNorm, SN2d)):
            nn.init.constant_(module.weight, 0)
            nn.init.constant_(module.bias, 3)
            module.weight.requires_grad_(False)
    x = maps()
    for training in (True, False):
        assert torch.equal(layer.train(training)(x), twin.train(training)(x))
    assert list(layer.state_dict()) == list(twin.state_dict())
    restored = layer.bnconv.__class__(4, 1, 1)  # and the norm that comes back has the taps as its affine
    layer.bnconv = restored
    assert layer.to_norm().weight.eq(1).all() and layer.to_norm().bias.eq(0).all()


def test_every_parameter_once_in_any_walk():
    """As the YOLO family groups them: each module's weight and bias, if it has such parameters."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3), BNET(4), nn.Conv2d(4, 4, 3, bias=False), BNET(4, norm='CBN'), SN2d(4))
    found = [
        getattr(module, name)
        for module in net.modules()
        for name in ('weight', 'bias')
        if hasattr(module, name) and isinstance(getattr(module, name), nn.Parameter)
    ]
    mixing = [net[4].mean_weight, net[4].var_weight]
    assert sorted(map(id, found + mixing)) == sorted(map(id, net.parameters()))
    # The blunt way, without asking for Parameter: nothing is stepped twice, nothing refused.
    blunt = [m.bias for m in net.modules() if getattr(m, 'bias', None) is not None and not m.bias.requires_grad]
    torch.optim.SGD(list(net.parameters()), lr=0.1)
    torch.optim.SGD(blunt, lr=0.1)


def test_zeroing_the_weight_zeroes_the_taps():
    layer = BNET(4)
    nn.init.constant_(layer.weight, 0)
    nn.init.constant_(layer.bias, 2)
    assert not layer.bnconv.weight.any() and layer.bnconv.bias.eq(2).all()
    layer(maps()).sum().backward()
    assert layer.bnconv.weight.grad is not None
