"""Normalising alone: nothing is left of constants, and nothing that hosts write to a norm's weight changes it."""

import copy

import pytest
import torch
from torch import nn

from bnet_mm import BNET, CBN, SN1d, SN2d, SN3d
from helpers import reference
from helpers.kinds import KINDS, batch_norms, maps

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


@pytest.mark.parametrize('norm', ['BN', 'SyncBN', 'IN', dict(type='GN', num_groups=2), 'CBN'], ids=str)
def test_stand_ins_are_ones_and_zeros_and_not_in_the_state_dict(norm):
    """What a host reads of a norm's affine says that there is none."""
    inner = BNET(4, k=3, norm=norm).norm
    assert inner.weight.tolist() == [1.0] * 4 and inner.bias.tolist() == [0.0] * 4
    assert not {'weight', 'bias'} & set(inner.state_dict())
