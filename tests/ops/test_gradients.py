"""First and second derivatives of the operation and of the moments."""

import itertools

import pytest
import torch

from bnet_mm.ops.bnet import bnet, moments
from helpers.kernels import DOUBLE, NAMES, compiled, make_inputs


def inputs_64(k, per_sample, channels_last=False, shape=(2, 2, 4, 3)):
    values = make_inputs(shape, k, torch.float64, per_sample, channels_last, residual=True)
    return [values[name] for name in NAMES]


@pytest.mark.parametrize('backend', [pytest.param('cpp', marks=compiled), 'reference'])
@pytest.mark.parametrize('k, per_sample, channels_last', [(3, False, False), (3, True, True), (5, True, False)])
def test_gradcheck_of_every_combination(k, per_sample, channels_last, backend, monkeypatch):
    monkeypatch.setenv('BNET_MM_BACKEND', backend)
    tensors = inputs_64(k, per_sample, channels_last)
    for i, needs in enumerate(itertools.product([False, True], repeat=len(NAMES))):
        if all(needs) or (any(needs) and backend == 'cpp'):  # of torch's own operators all at once will do
            arguments = [tensor.clone().requires_grad_(need) for tensor, need in zip(tensors, needs)]
            assert torch.autograd.gradcheck(lambda *t: bnet(*t, relu=i % 2 == 1), arguments), needs  # noqa: B023


def batch_normalised(over_batch):
    """The pass of a training step, from moments to transform, without and with a detached part."""

    def function(x, weight, bias):
        x, mean, var = moments(x, over_batch)
        return bnet(x, mean, (var + 1e-5).rsqrt(), weight, bias)

    return function


@pytest.mark.parametrize('backend', [pytest.param('cpp', marks=compiled), 'reference'])
@pytest.mark.parametrize('k, over_batch, channels_last', [(3, True, False), (3, False, True), (5, True, True)])
def test_gradcheck_with_batch_statistics(k, over_batch, channels_last, backend, monkeypatch):
    monkeypatch.setenv('BNET_MM_BACKEND', backend)
    x, _, _, weight, bias, _ = inputs_64(k, False, channels_last)
    for needs in itertools.product([False, True], repeat=3):
        if any(needs):
            arguments = [tensor.clone().requires_grad_(need) for tensor, need in zip((x, weight, bias), needs)]
            assert torch.autograd.gradcheck(batch_normalised(over_batch), arguments), needs


@compiled
def test_gradcheck_of_moments_alone():
    for over_batch, outputs in itertools.product((True, False), ((1,), (2,), (1, 2))):
        x = torch.randn(2, 2, 3, 3, requires_grad=True, **DOUBLE)
        assert torch.autograd.gradcheck(lambda x: [moments(x, over_batch)[i] for i in outputs], x)  # noqa: B023


@compiled
@pytest.mark.parametrize('k, per_sample', [(1, False), (3, True)])
def test_second_derivatives(k, per_sample):
    tensors = [tensor.requires_grad_() for tensor in inputs_64(k, per_sample, shape=(2, 2, 3, 2))]
    for relu in (False, True):
        assert torch.autograd.gradgradcheck(lambda *t: bnet(*t, relu=relu), tensors)  # noqa: B023
    x, _, _, weight, bias, _ = tensors
    assert torch.autograd.gradgradcheck(batch_normalised(not per_sample), (x, weight, bias))

    def own_statistics(x, weight, bias):  # arguments that depend on each other
        rstd = (x.square().mean((2, 3) if per_sample else (0, 2, 3)) + 1).rsqrt()
        return bnet(x, rstd.exp(), rstd, weight, bias)

    assert torch.autograd.gradgradcheck(own_statistics, (x, weight, bias))
    for function in (batch_normalised(not per_sample), own_statistics):
        y = function(x, weight, bias).square().sum()
        once = torch.autograd.grad(y, (x, weight, bias), retain_graph=True)
        torch.testing.assert_close(torch.autograd.grad(y, (x, weight, bias), create_graph=True), once)


@compiled
@pytest.mark.parametrize('per_sample', [False, True])
@pytest.mark.parametrize('k', [1, 3, 5, 7])
def test_finite_differences_in_float32(k, per_sample):
    """Along random directions, of a map that the float64 checks are too slow for."""
    values = make_inputs((2, 19, 15, 33), k, torch.float32, per_sample)
    grad, step = torch.randn(2, 19, 15, 33), 1e-2
    tensors = [values[name].requires_grad_() for name in ('x', 'weight', 'bias')]
    for function in (batch_normalised(not per_sample), lambda *t: bnet(t[0], values['mean'], values['rstd'], *t[1:])):
        slopes = torch.autograd.grad(function(*tensors), tensors, grad)
        for i, slope in enumerate(slopes):
            direction = slope + torch.randn_like(slope)
            sums = []
            for sign in (step, -step):
                moved = [t.detach() + sign * direction if t is tensors[i] else t for t in tensors]
                sums.append((function(*moved).double() * grad).sum())
            want = (slope.double() * direction).sum()
            torch.testing.assert_close((sums[0] - sums[1]) / (2 * step), want, rtol=1e-2, atol=0)
