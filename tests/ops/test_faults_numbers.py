"""Faults that users of such layers report: a gradient rounded too early, and behaviour that differs by backend."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from bnet_mm import BNET
from bnet_mm.layers import sync_batch_norm
from bnet_mm.ops.bnet import Map, bnet, moments
from bnet_mm.ops.dispatch import load_backend

BUILT, WHY = load_backend('cpp')
INTERPRETED = os.environ.get('TRITON_INTERPRET') == '1'
BACKEND = 'triton' if INTERPRETED else 'cpp'
compiled = pytest.mark.skipif(not BUILT and not INTERPRETED, reason=f'no C++ extension: {WHY}')
kernels_only = pytest.mark.skipif(INTERPRETED, reason='needs no kernels')
KINDS = {
    'BN': {}, 'BN untracked': dict(track_running_stats=False), 'SyncBN': dict(norm='SyncBN'),
    'GN': dict(norm=dict(type='GN', num_groups=4)), 'LN': dict(norm=dict(type='GN', num_groups=1)),
    'IN': dict(norm='IN'), 'SN': dict(norm='SN'), 'SyncSN': dict(norm='SyncSN'),
}  # fmt: skip
HALVES = [torch.bfloat16, torch.float16] if INTERPRETED else [torch.bfloat16]
SHAPE = (4, 8, 28, 28)
COMMON = [(1, 0.1), (10, 0.1), (10, 1), (0, 1)]  # mean and spread of the output's gradient
MOMENTA = [0.1, 0.9, 1.0, None]
if INTERPRETED:  # slow
    KINDS = {kind: KINDS[kind] for kind in ('BN', 'GN', 'SN')}
    SHAPE, COMMON, MOMENTA = (2, 8, 9, 10), COMMON[:2], MOMENTA[:1]


def input_gradient(layer, x, grad):
    leaf = x.detach().requires_grad_()
    (found,) = torch.autograd.grad(layer(leaf), leaf, grad)
    assert found.dtype == x.dtype
    return found.double()


def relative_error(layer, x, grad, monkeypatch):
    """Of the input gradient, against torch's own operators in float64."""
    got = input_gradient(layer, x, grad)
    with monkeypatch.context() as patch:
        patch.setenv('BNET_MM_BACKEND', 'reference')
        exact = input_gradient(copy.deepcopy(layer).double(), x.double(), grad.double())
    return ((got - exact).norm() / exact.norm()).item()


# --- Rounding before a subtraction


@compiled
@pytest.mark.parametrize('channels_last', [False, True], ids=['nchw', 'channels_last'])
@pytest.mark.parametrize('dtype', HALVES, ids=str)
@pytest.mark.parametrize('kind', KINDS)
def test_input_gradient_in_half_precision(kind, dtype, channels_last, monkeypatch):
    """At most twice BatchNorm2d's own error, whatever the output's gradient has in common."""
    cut_off = INTERPRETED and dtype == torch.bfloat16  # by Triton's interpreter, where a GPU rounds to nearest
    layout = torch.channels_last if channels_last else torch.contiguous_format
    for common, spread in COMMON:
        x = (torch.randn(SHAPE) * 2 + 1).to(dtype).to(memory_format=layout)
        grad = (common + spread * torch.randn(SHAPE)).to(dtype).to(memory_format=layout)
        theirs = relative_error(nn.BatchNorm2d(8), x, grad, monkeypatch)
        for k in (3,) if INTERPRETED else (1, 3, 5, 7):
            layer = BNET(8, k, **KINDS[kind])
            with torch.no_grad():  # so that the gradient of the normalised map has a common part, too
                layer.bnconv.weight.add_(torch.rand_like(layer.bnconv.weight) / k**2)
            monkeypatch.setenv('BNET_MM_BACKEND', BACKEND)
            ours = relative_error(layer, x, grad, monkeypatch)
            assert ours <= (4 if cut_off else 2) * theirs, (k, common, ours, theirs)


@compiled
def test_input_gradient_in_wide_types_keeps_its_accuracy(monkeypatch):
    monkeypatch.setenv('BNET_MM_BACKEND', BACKEND)
    for kind, options in KINDS.items():
        x, grad = torch.randn(SHAPE) * 2 + 1, 10 + torch.randn(SHAPE)
        ours = relative_error(BNET(8, 3, **options), x, grad, monkeypatch)
        assert ours <= 2 * relative_error(nn.BatchNorm2d(8), x, grad, monkeypatch) + 3e-7, kind


@pytest.mark.parametrize('backend', [pytest.param(BACKEND, marks=compiled), 'reference'])
def test_operation_by_itself_in_half_precision(backend, monkeypatch):
    """``moments`` and ``bnet`` on every backend; and with taps that only torch's own operators take."""
    monkeypatch.setenv('BNET_MM_BACKEND', 'auto' if backend == 'cpp' else backend)
    x, grad = torch.randn(SHAPE).bfloat16(), (10 + torch.randn(SHAPE)).bfloat16()
    bias = torch.zeros(8)

    def normalised(x, k, moments, bnet):
        weight = torch.zeros(8, 1, k, k, dtype=torch.promote_types(x.dtype, torch.float32))
        weight[:, 0, k // 2, k // 2] = 1
        maps, mean, var = moments(x, True)
        return bnet(maps, mean, (var + 1e-5).rsqrt(), weight, bias.to(weight.dtype))

    def plain(x, mean, rstd, *_):
        return (x - mean.view(-1, 1, 1)) * rstd.view(-1, 1, 1)

    def plain_moments(x, over_batch):
        return x, *reversed(torch.var_mean(x, (0, 2, 3), correction=0))

    exact = input_gradient(lambda x: normalised(x, 1, plain_moments, plain), x.double(), grad.double())
    for k in (1, 3, 9) if backend == 'cpp' else (1, 3):
        got = input_gradient(lambda x: normalised(x, k, moments, bnet), x, grad)  # noqa: B023
        assert (got - exact).norm() / exact.norm() < 4e-3, k


@compiled
def test_second_derivatives_in_half_precision(monkeypatch):
    """They are those of float64 within rounding; the carrier takes no memory and is never the map."""
    monkeypatch.setenv('BNET_MM_BACKEND', BACKEND)
    results = []
    for dtype in (torch.bfloat16, torch.float64):
        torch.manual_seed(0)
        x = torch.randn(2, 3, 6, 6).bfloat16().to(dtype).requires_grad_()
        if dtype == torch.float64:
            monkeypatch.setenv('BNET_MM_BACKEND', 'reference')
        maps, mean, var = moments(x, True)
        y = bnet(maps, mean, (var + 1).rsqrt(), torch.randn(3, 1, 3, 3).to(mean.dtype), torch.zeros_like(mean))
        (first,) = torch.autograd.grad((y**2).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad((first**2).sum(), x)
        results.append((first.double(), second.double()))
        if dtype == torch.bfloat16:
            assert isinstance(maps, Map) and maps.x is x and maps.carrier.untyped_storage().nbytes() == 4
    for value, exact in zip(*results):
        assert (value - exact).norm() / exact.norm() < 2e-2


@kernels_only
@compiled
@pytest.mark.parametrize('per_sample', [False, True])
@pytest.mark.parametrize('channels_last', [False, True])
@pytest.mark.parametrize('shape', [(2, 17, 5, 7), (1, 3, 1, 1), (3, 5, 14, 33)], ids=str)
def test_operators_that_keep_a_wide_gradient(shape, channels_last, per_sample):
    """Against formulas in float64; and what torch.compile is told of them is what comes out."""
    ops, n, c = torch.ops.bnet_mm, *shape[:2]
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x, grad = (torch.randn(shape).bfloat16().to(memory_format=layout) for _ in range(2))
    mean, rstd, grad_mean, grad_var = torch.rand(4, *((n, c) if per_sample else (c,)))
    weight = torch.randn(c, 1, 3, 3)
    arguments = (grad, x, mean, rstd, weight, True, True, True)
    wide, rounded = ops.backward(*arguments)[0], ops.backward(*arguments[:-1])[0]
    assert wide.dtype == torch.float32 and torch.equal(wide.bfloat16(), rounded)
    got = ops.moments_backward_rounded(wide, x, mean, grad_mean, grad_var)
    count = x.numel() / mean.numel()
    numbers = (mean, grad_mean / count, 2 * grad_var / count)
    centre, shift, scale = (number.double().view(-1, c, 1, 1) for number in numbers)
    exact = wide.double() + shift + scale * (x.double() - centre)
    assert got.dtype == torch.bfloat16 and ((got - exact).abs() <= exact.abs() * 2**-8).all()
    on_meta = [argument.to('meta') if isinstance(argument, torch.Tensor) else argument for argument in arguments]
    told = ops.backward(*on_meta)[0], ops.moments_backward_rounded(*(t.to('meta') for t in (wide, x, mean, mean, mean)))
    for tensor, value in zip(told, (wide, got)):
        assert (tensor.shape, tensor.dtype) == (value.shape, value.dtype)
        assert all(a == b for a, b, size in zip(tensor.stride(), value.stride(), shape) if size > 1)
    transposed = wide.transpose(2, 3).contiguous().transpose(2, 3)
    assert torch.equal(got, ops.moments_backward_rounded(transposed, x, mean, grad_mean, grad_var))
    for wrong in (wide.double(), wide.bfloat16(), wide[..., :0], wide.to('meta')):
        with pytest.raises((ValueError, TypeError), match='bnet: grad must'):
            ops.moments_backward_rounded(wrong, x, mean, grad_mean, grad_var)


# --- One behaviour, torch's


@kernels_only
@pytest.mark.parametrize('backend', ['auto', 'reference'])
@pytest.mark.parametrize('norm, plain', [
    ('BN', nn.BatchNorm2d(3, track_running_stats=False)), ('SyncBN', nn.BatchNorm2d(3, track_running_stats=False)),
    ('IN', nn.InstanceNorm2d(3)), (dict(type='GN', num_groups=3), nn.GroupNorm(3, 3)),
], ids=str)  # fmt: skip
def test_single_values_are_refused_where_torch_refuses_them(norm, plain, backend, monkeypatch):
    """BN without running statistics in evaluation; IN and GN always."""
    monkeypatch.setenv('BNET_MM_BACKEND', backend)
    options = dict(track_running_stats=False) if norm in ('BN', 'SyncBN') else {}
    for training in (True, False):
        layer = BNET(3, 3, norm=norm, **options).train(training)
        for x in (torch.randn(1, 3, 1, 1), torch.randn(2, 3, 1, 1), torch.randn(1, 3, 1, 2)):
            outcomes = []
            for function in (layer, copy.deepcopy(plain).train(training)):
                try:
                    outcomes.append(function(x).shape)
                except ValueError:
                    outcomes.append(ValueError)
            assert outcomes[0] == outcomes[1], (training, x.shape, outcomes)


@pytest.mark.parametrize('backend', [pytest.param(BACKEND, marks=compiled), 'reference'])
@pytest.mark.parametrize('momentum', MOMENTA)
@pytest.mark.parametrize('bad', [torch.inf, -torch.inf, torch.nan], ids=str)
@pytest.mark.parametrize('norm', ['BN', 'SyncBN'])
def test_running_statistics_of_an_infinite_input(norm, bad, momentum, backend, monkeypatch):
    monkeypatch.setenv('BNET_MM_BACKEND', backend)
    layer, plain = BNET(5, 3, norm=norm, momentum=momentum), nn.BatchNorm2d(5, momentum=momentum)
    if INTERPRETED:
        monkeypatch.setattr('bnet_mm.ops.triton.plans.PROGRAMS', 1)  # several blocks for each program
    x = torch.randn(3, 5, 9, 40)[..., : 5 if INTERPRETED else 40]
    x[1, 1, 3, -1] = x[2, 3, 0, 0] = bad
    x[0, 3, 8, -1] = -bad  # no mean
    for layout in (torch.contiguous_format, torch.channels_last):
        layer.norm.reset_running_stats()
        plain.reset_running_stats()
        for step in (x, x, x[:1]):
            layer(step.contiguous(memory_format=layout))
            plain(step.contiguous(memory_format=layout))
        for name in ('running_mean', 'running_var'):
            torch.testing.assert_close(getattr(layer.norm, name), getattr(plain, name), equal_nan=True)


@kernels_only
@pytest.mark.parametrize('shape', [(0, 3), (0, 3, 4), (0, 3, 4, 5), (2, 3, 0, 5), (2, 3, 4, 5, 0)], ids=str)
def test_empty_batches_take_part_in_synchronised_statistics(shape, monkeypatch):
    """Their gradients go to the collective, for which the other processes wait."""
    joined = []

    class Join(torch.autograd.Function):
        @staticmethod
        def forward(ctx, mean, var, count, group):
            return mean + 1, var + 1, torch.tensor(8.0)

        @staticmethod
        def backward(ctx, grad_mean, grad_var, _):
            joined.append((grad_mean, grad_var))
            return grad_mean, grad_var, None, None

    monkeypatch.setattr(sync_batch_norm, 'world_size', lambda group: 2)
    monkeypatch.setattr(sync_batch_norm, '_JoinStatistics', Join)
    x = torch.randn(shape, requires_grad=True)
    y = sync_batch_norm.SyncBatchNorm(3)(x)
    y.sum().backward()
    assert y.shape == x.grad.shape == shape and y.dtype == x.dtype
    assert len(joined) == 1 and not any(grad.any() for grad in joined[0])


@kernels_only
@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('kind', KINDS)
def test_dtypes_under_autocast_are_those_of_two_operators(kind, training, monkeypatch):
    """A convolution decides the dtype: bfloat16, for every k and on every backend; float64 stays."""
    x = torch.randn(4, 8, 7, 6)
    convolution = nn.Conv2d(8, 8, 3, padding=1, groups=8)
    plain = nn.Sequential(nn.BatchNorm2d(8), convolution).train(training)
    for backend in ('auto', 'reference'):
        monkeypatch.setenv('BNET_MM_BACKEND', backend)
        for k in (1, 3, 7, 9):
            layer = BNET(8, k, **KINDS[kind]).train(training)
            want = layer(x)
            with torch.autocast('cpu', dtype=torch.bfloat16):
                leaf = x.clone().requires_grad_()
                y, expected = layer(leaf), plain(x)
                assert y.dtype == expected.dtype == torch.bfloat16
                assert layer.double()(x.double()).dtype == torch.float64
            layer.float()
            torch.testing.assert_close(y.float(), want, rtol=2e-2, atol=2e-2)
            y.float().square().sum().backward()
            assert leaf.grad.dtype == torch.float32
            with torch.autocast('cpu', enabled=False):
                assert layer(x).dtype == torch.float32


@pytest.mark.skipif(INTERPRETED, reason='is the interpreter')
def test_in_the_interpreter():
    """The same by the Triton kernels, without a GPU."""
    pytest.importorskip('triton', reason='Triton is not installed')
    command = [sys.executable, '-m', 'pytest', '-p', 'no:cacheprovider', '-p', 'no:xdist', __file__]
    environment = dict(os.environ, TRITON_INTERPRET='1', PYTHONPATH=str(Path(__file__).parents[2]))
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
    assert run.returncode == 0 and ' passed' in run.stdout, run.stdout[-6000:] + run.stderr
