"""Any stock config becomes its BNET version with one line: see helpers/zoo.py for the configs and how it is said."""

import copy
import math

import pytest
import torch
from mmengine.logging import MessageHub
from mmengine.optim import OptimWrapper

from bnet_mm import BNET
from bnet_mm.surgery.tails import FusedTail, unfuse_tails
from helpers import zoo


def bnet_layers(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, BNET)}


def off_centre_taps(layer):
    taps = layer.bnconv.weight.detach().clone()
    taps[..., layer.bnconv.k // 2, layer.bnconv.k // 2] = 0
    return taps


def train_step(model, entry):
    """One step of the host's own training; returns the loss and the names of the BNET layers that it ran."""
    model.train()
    ran = set()
    hooks = [m.register_forward_hook(lambda *_, n=name: ran.add(n)) for name, m in bnet_layers(model).items()]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    MessageHub.get_current_instance().update_info('epoch', 0)  # as a hook of the Runner does
    logs = model.train_step(zoo.batch(entry), OptimWrapper(optimizer))
    for hook in hooks:
        hook.remove()
    return float(logs['loss']), ran


def assert_same(got, want):
    assert len(got) == len(want) > 0
    for a, b in zip(got, want):
        assert b.isfinite().all() and b.abs().max() > 0
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9 * b.abs().max().item())


@pytest.mark.parametrize(
    'entry',
    [
        pytest.param(e, id=e.config.partition('::')[2].removesuffix('.py'), marks=[] if e.fast else pytest.mark.zoo)
        for e in zoo.ZOO
    ],
)
def test_bnet_version_of_a_stock_config(entry):
    plain, model = zoo.build(entry), zoo.build(entry, entry.bnet)
    layers = bnet_layers(model)
    assert type(model) is type(plain)
    assert len(layers) == entry.layers

    # The host initialises BNET as it initialises the BN that stood there.
    plain.init_weights(), model.init_weights()
    for name, layer in layers.items():
        norm = plain.get_submodule(name)
        gamma = torch.zeros_like(norm.weight) if entry.zeroed else norm.weight
        torch.testing.assert_close([layer.weight, layer.bias], [gamma, norm.bias], rtol=0, atol=1e-3)
        assert not off_centre_taps(layer).any(), name

    # It reads the weights of the plain model, nothing missing or unexpected, and is the same function.
    zoo.randomise_norms(plain)
    model.load_state_dict(plain.state_dict())
    data = zoo.batch(entry)
    before = zoo.outputs(plain, entry, data)
    assert_same(zoo.outputs(model, entry, data), before)

    # It trains: every layer that is not frozen moves away from BN.
    model.train()
    frozen = {name for name, layer in layers.items() if not layer.bnconv.weight.requires_grad}
    assert len(frozen) == entry.frozen
    loss, ran = train_step(model, entry)
    assert math.isfinite(loss)
    assert ran == set(layers)
    for name, layer in layers.items():
        taps = off_centre_taps(layer)
        assert taps.isfinite().all() and taps.any() == (name not in frozen), name

    # Its own weights load into a new one.
    with torch.no_grad():
        for layer in layers.values():
            layer.bnconv.weight.add_(torch.randn_like(layer.bnconv.weight) * 0.1)
    after = zoo.outputs(model, entry, data)
    assert any(not torch.allclose(a, b) for a, b in zip(after, before))

    # In one pass or by the host's code, the tails of its residual blocks are the same.
    twin = copy.deepcopy(model)
    unfuse_tails(twin)
    assert not any(isinstance(m, FusedTail) for m in twin.modules())
    assert_same(zoo.outputs(twin, entry, data), after)
    got, want = (zoo.learned(copy.deepcopy(m), entry, data) for m in (model, twin))
    assert got.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-7, atol=1e-9 * max(1, value.abs().max()), msg=name)

    again = zoo.build(entry, entry.bnet)
    again.load_state_dict(model.state_dict())
    assert_same(zoo.outputs(again, entry, data), after)


@pytest.mark.parametrize('config, instead', zoo.NOTHING_AT_C.items())
def test_networks_without_such_norms_are_refused(config, instead):
    entry = zoo.Entry(config, layers=0)
    with pytest.raises(ValueError, match=f"no norm to replace at where='C' in .*{instead}"):
        zoo.build(entry, entry.bnet)
