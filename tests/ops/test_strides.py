"""Any strides come in, and nothing that is given changes."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bnet_mm import BNET
from bnet_mm.ops.bnet import bnet, moments
from helpers import reference
from helpers.kernels import CHANNELS_LAST, DOUBLE, DTYPES, PARAMETERS, compiled, make_inputs, run


def strided(kind, x):
    """The same numbers in other strides."""
    if kind == 'sliced':
        return F.pad(x, (3, 2, 1, 1))[..., 1:-1, 3:-2]
    if kind == 'every other channel':
        return x.repeat_interleave(2, dim=1)[:, ::2]
    if kind == 'transposed':
        return x.transpose(2, 3).contiguous().transpose(2, 3)
    if kind == 'batch inside':
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    return x.contiguous(memory_format=CHANNELS_LAST) if kind == 'channels_last' else x.contiguous()


STRIDES = ['contiguous', 'channels_last', 'sliced', 'every other channel', 'transposed', 'batch inside']


@compiled
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('kind', STRIDES)
def test_any_strides(kind, dtype):
    """Of map, incoming gradient, residual, and of what goes with the channels; the result's own are NCHW or NHWC."""
    values = make_inputs((3, 17, 7, 13), 3, DTYPES[dtype], True, residual=True)
    grad = torch.randn(3, 17, 7, 13).to(DTYPES[dtype])
    want = run(bnet, values, grad)
    for changed in ('x', 'residual', 'grad'):
        twin = {**values, 'grad': grad}
        twin[changed] = strided(kind, twin[changed])
        got = run(bnet, twin, twin['grad'])
        last = changed == 'x' and kind == 'channels_last'
        for name in ('y', 'x'):
            assert got[name].is_contiguous(memory_format=CHANNELS_LAST if last else torch.contiguous_format)
        for name, value in want.items():
            if last:  # other sums
                torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-4)
            else:
                assert torch.equal(got[name], value), (changed, name)
    for name in PARAMETERS:
        spread = torch.stack([values[name], torch.full_like(values[name], torch.nan)], -1)[..., 0]
        assert not spread.is_contiguous()
        got = run(bnet, {**values, name: spread}, grad)
        assert all(torch.equal(got[key], value) for key, value in want.items()), name
    same, mean, var = moments(strided(kind, values['x']), True)
    torch.testing.assert_close((mean, var), moments(values['x'], True)[1:], rtol=1e-5, atol=1e-5)


@compiled
def test_expanded_tensors():
    """One image, one channel and one number for all; and the gradient of a sum, which is one number."""
    values = make_inputs((3, 5, 6, 7), 3, torch.float32)
    for name, part in [('x', values['x'][:1]), ('x', values['x'][:, :1]), ('mean', values['mean'][:1])]:
        expanded = {**values, name: part.expand_as(values[name])}
        dense = {**values, name: part.expand_as(values[name]).contiguous()}
        grad = torch.tensor(0.5).expand(3, 5, 6, 7)
        got, want = run(bnet, expanded, grad), run(bnet, dense, grad.contiguous())
        assert all(torch.equal(got[key], value) for key, value in want.items())


@compiled
@pytest.mark.parametrize('channels_last', [False, True])
@pytest.mark.parametrize('k', [1, 3])
def test_nothing_that_is_given_changes(k, channels_last):
    """Neither the arguments, nor the gradient that comes in, nor that of a tensor in between."""
    values = make_inputs((2, 5, 7, 6), k, torch.float32, channels_last=channels_last, residual=True)
    layer = reference.randomise(BNET(5, k))
    kept = {name: value.clone() for name, value in values.items()}
    grad = torch.randn(2, 5, 7, 6)
    first = grad.clone()
    run(bnet, values, first, relu=True)
    assert torch.equal(first, grad)
    x = values['x'].requires_grad_()
    seen = []
    doubled = x * 2
    doubled.register_hook(lambda g: seen.append((g, g.clone())))
    doubled.retain_grad()
    y = layer(doubled)
    y.register_hook(lambda g: seen.append((g, g.clone())))
    y.retain_grad()
    incoming = grad.clone()
    for _ in range(2):
        y.backward(incoming, retain_graph=True)
    assert torch.equal(incoming, grad)
    assert torch.equal(y.grad, grad * 2) and torch.equal(doubled.grad * 2, x.grad)
    assert len(seen) == 4 and all(torch.equal(now, then) for now, then in seen[:2])
    assert all(torch.equal(values[name], value) for name, value in kept.items())


@compiled
@pytest.mark.parametrize('training', [True, False])
def test_input_with_several_uses(training, monkeypatch):
    """Two layers over one map, the map as its own residual, a shortcut: gradients are those of the reference."""
    layers = reference.randomise(nn.ModuleList([BNET(4, 3), BNET(4, 5), BNET(4, 1)])).double().train(training)
    x = torch.randn(3, 4, 7, 6, requires_grad=True, **DOUBLE)
    weight, bias = torch.randn(4, 1, 3, 3, **DOUBLE), torch.randn(4, **DOUBLE)

    def loss():
        first = layers[0](x)
        normed, mean, var = moments(x, over_batch=True)
        own = bnet(normed, mean, (var + 1).rsqrt(), weight, bias, residual=x, relu=True)
        return (first * x + layers[1](x) * layers[2](first) + x.exp() + own * first).square().sum()

    results = []
    for backend in ('cpp', 'reference'):
        monkeypatch.setenv('BNET_MM_BACKEND', backend)
        results.append(torch.autograd.grad(loss(), [x, *layers.parameters()]))
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)
