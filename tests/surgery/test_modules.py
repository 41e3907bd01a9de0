"""Norms and changed modules are known; modules are replaced wherever they stand."""

import pytest
import torch
from torch import nn

from bnet_mm import BNET, CBN, BNConv, FReLU, SN2d, SyncSN
from bnet_mm.surgery.modules import is_changed, is_norm, replace_modules

NORMS = [
    nn.BatchNorm1d(4), nn.BatchNorm2d(4), nn.BatchNorm3d(4), nn.SyncBatchNorm(4), nn.LazyBatchNorm2d(),
    nn.GroupNorm(2, 4), nn.InstanceNorm2d(4), nn.LayerNorm(4), nn.LocalResponseNorm(2), SN2d(4), SyncSN(4), CBN(4),
]  # fmt: skip
OTHERS = [nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Identity(), nn.Sequential(nn.BatchNorm2d(4)), FReLU(4), BNConv(4)]


@pytest.mark.parametrize('module', NORMS, ids=lambda module: type(module).__name__)
def test_norms(module):
    assert is_norm(module)


@pytest.mark.parametrize('module', OTHERS, ids=lambda module: type(module).__name__)
def test_no_norms(module):
    assert not is_norm(module)


def with_weight_norm(net):
    nn.utils.parametrizations.weight_norm(net[0])


CHANGES = {
    'nothing': (lambda net: None, False),
    'training mode': (lambda net: net.eval(), False),
    'a forward hook': (lambda net: net.register_forward_hook(lambda *_: None), True),
    'a forward pre-hook': (lambda net: net.register_forward_pre_hook(lambda *_: None), True),
    'a hook inside': (lambda net: net[1].norm.register_full_backward_hook(lambda *_: None), True),
    'a parametrization inside': (with_weight_norm, True),
}


@pytest.mark.parametrize('what', CHANGES)
def test_what_has_been_changed(what):
    net = nn.Sequential(nn.Conv2d(3, 4, 1), BNET(4))
    change, expected = CHANGES[what]
    change(net)
    assert is_changed(net) == expected


def test_a_removed_hook_is_none():
    norm = nn.BatchNorm2d(3)
    handle = norm.register_forward_hook(lambda *_: None)
    assert is_changed(norm)
    handle.remove()
    assert not is_changed(norm)


def test_modules_in_several_places_are_replaced_in_all():
    shared, alone = nn.ReLU(), nn.Conv2d(3, 3, 1)
    net = nn.Module()
    net.first, net.second, net.inner = shared, shared, nn.Sequential(alone, shared, nn.Sequential(shared))
    new = nn.Sigmoid()
    replace_modules(net, {shared: new})
    assert net.first is net.second is net.inner[1] is net.inner[2][0] is new and net.inner[0] is alone
    replace_modules(net, {})
    assert [type(m) for m in net.inner] == [nn.Conv2d, nn.Sigmoid, nn.Sequential]
    x = torch.randn(1, 3, 2, 2)
    torch.testing.assert_close(net.inner(x), alone(x).sigmoid().sigmoid())
