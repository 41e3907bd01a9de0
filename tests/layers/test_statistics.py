"""What torch's batch norm does with its statistics, every layer that keeps some does: BatchNorm2d is the measure."""

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, update_bn

from bnet_mm import BNET, CBN, BNConv, FReLU, SN1d, SN2d, SN3d, SyncSN, enhance
from helpers import reference
from helpers.kinds import KINDS, TRACKING, batch_norms, maps


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
