"""The layer with every normaliser on the kernels."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bnet_mm import BNET
from bnet_mm.ops import select_backend
from helpers import reference
from helpers.kernels import DOUBLE, DTYPES, Calls, compiled

LAYERS = {
    'BN': {}, 'BN plain average': dict(momentum=None), 'BN untracked': dict(track_running_stats=False),
    'SyncBN': dict(norm='SyncBN'), 'GN': dict(norm=dict(type='GN', num_groups=3)),
    'LN': dict(norm=dict(type='GN', num_groups=1)), 'IN': dict(norm='IN'), 'SN': dict(norm='SN'),
    'SN without BN': dict(norm=dict(type='SN', using_bn=False)), 'SyncSN': dict(norm='SyncSN'),
}  # fmt: skip
ONE_OPERATION = ('BN', 'BN untracked', 'SyncBN')


def learn(model, x, backend, monkeypatch, steps=2):
    """Forward and backward passes on a copy: what came out, and the operators that ran."""
    monkeypatch.setenv('BNET_MM_BACKEND', backend)
    model, out = copy.deepcopy(model), []
    select_backend(x, 3)  # which loads it, where another test has made it forget
    with Calls() as calls:
        for step in range(steps):
            leaf = (x * (1 + step)).requires_grad_()
            y = model(leaf)
            grads = torch.autograd.grad((y * y.detach().flip(0).cos()).sum(), [leaf, *model.parameters()])
            out += [y.detach(), *grads]
    return out + list(model.state_dict().values()), calls.names


@compiled
@pytest.mark.parametrize('name', LAYERS)
@pytest.mark.parametrize('mode', ['training', 'frozen', 'evaluation'])
def test_norms_run_on_the_kernels_and_equal_the_modules(name, mode, monkeypatch):
    """One after the other, and in one pass: outputs, gradients, running statistics."""
    for dtype, tolerance in (('float64', 1e-10), ('float32', 1e-5)):
        layer = reference.randomise(BNET(6, 3, **LAYERS[name])).to(DTYPES[dtype]).train(mode != 'evaluation')
        if mode == 'frozen':  # norm_eval=True
            layer.norm.eval()
        x = torch.randn(4, 6, 9, 7, dtype=DTYPES[dtype]) * 2 + 1
        got, calls = learn(layer, x, 'cpp', monkeypatch)
        want, none = learn(layer, x, 'reference', monkeypatch)
        whole = name in ONE_OPERATION or (name == 'BN plain average' and mode != 'training')
        parts = ['norm', 'norm_backward'] if whole else ['moments', 'forward', 'backward', 'moments_backward']
        assert calls == parts * 2 and none == []
        for a, b in zip(got, want):
            scale = max(1.0, b.abs().max().item())
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * scale)


@compiled
def test_cross_iteration_norm_runs_as_a_module(monkeypatch):
    """Its statistics depend on past inputs of the convolution before it."""
    model = reference.randomise(nn.Sequential(nn.Conv2d(3, 6, 3), BNET(6, 3, norm='CBN'))).double()
    x = torch.randn(4, 3, 9, 7, **DOUBLE)
    (got, calls), (want, _) = (learn(model, x, backend, monkeypatch) for backend in ('cpp', 'reference'))
    assert calls == ['forward', 'norm', 'norm_backward', 'backward'] * 2  # normalised first, then transformed
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


HOOKS = ['register_forward_hook', 'register_forward_pre_hook', 'register_full_backward_hook']


@compiled
@pytest.mark.parametrize('kind', HOOKS)
@pytest.mark.parametrize('part', ['norm', 'bnconv', ''])
def test_hooks_are_called(part, kind, monkeypatch):
    """Of the parts: so they run one after the other; of the layer itself: so it may run in one pass."""
    layer = reference.randomise(BNET(3, 3)).double()
    x = torch.randn(2, 3, 5, 6, **DOUBLE)
    seen, normalised, batch_norm = [], [], F.batch_norm
    want, _ = learn(layer, x, 'cpp', monkeypatch)
    monkeypatch.setattr(F, 'batch_norm', lambda *arguments: normalised.append(1) or batch_norm(*arguments))
    getattr(layer.get_submodule(part), kind)(lambda *arguments: seen.append(arguments[1]))
    got, _ = learn(layer, x, 'cpp', monkeypatch)
    assert len(seen) == 2 and len(normalised) == (0 if part == '' else 2)
    torch.testing.assert_close(got, want)
    if part == 'bnconv' and kind == 'register_forward_pre_hook':  # sees the normalised map
        torch.testing.assert_close(seen[0][0], batch_norm(x, None, None, training=True))


@compiled
def test_saved_bytes_are_batch_norms():
    """What autograd keeps between the passes: the map and numbers per channel, at most 1 % more than BatchNorm2d."""
    x = torch.randn(4, 64, 56, 56, requires_grad=True)

    def measure(layer):
        saved = {}

        def keep(tensor):
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            y = layer(x)
        y.sum().backward()
        return sum(saved.values())

    plain = measure(nn.BatchNorm2d(64))
    assert plain >= x.nbytes
    for k in (1, 3, 5, 7):
        assert x.nbytes <= measure(BNET(64, k)) <= 1.01 * plain, k
