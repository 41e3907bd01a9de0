"""The operation against float64 and against the two operators of Algorithm 1; NaN, infinity, nothing."""

import copy
import itertools

import pytest
import torch

from bnet_mm import BNET
from bnet_mm.ops import bnet_reference
from bnet_mm.ops.bnet import bnet, moments
from helpers import reference
from helpers.kernels import (
    DTYPES,
    MOMENTS,
    NAMES,
    PARAMETERS,
    SHAPES,
    Calls,
    check_errors,
    check_moments,
    compiled,
    make_inputs,
    run,
    two_operators,
)


@compiled
@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('channels_last', [False, True], ids=['nchw', 'channels_last'])
@pytest.mark.parametrize('k', [1, 3, 5, 7])
def test_error_is_at_most_four_times_that_of_two_operators(k, channels_last, dtype):
    with Calls() as calls:
        check_errors(k, channels_last, DTYPES[dtype], SHAPES)
    assert calls.names == ['forward', 'backward'] * len(SHAPES)


@compiled
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('channels_last', [False, True], ids=['nchw', 'channels_last'])
def test_sums_over_large_maps(channels_last, dtype):
    for k in (1, 3, 7):
        check_errors(k, channels_last, DTYPES[dtype], [(1, 16, 200, 334), (2, 5, 97, 211)])


@compiled
@pytest.mark.parametrize('shape, over_batch, channels_last', MOMENTS)
def test_moments_do_not_cancel(shape, over_batch, channels_last):
    check_moments(shape, over_batch, channels_last)


def positions(x):
    return torch.stack([x.isnan(), x == torch.inf, x == -torch.inf])


@compiled
@pytest.mark.parametrize('bad', [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('channels_last', [False, True], ids=['nchw', 'channels_last'])
@pytest.mark.parametrize('k', [1, 3, 7])
def test_nan_and_inf_go_where_two_operators_send_them(k, channels_last, dtype, bad):
    """No further: not into channels, rows or samples beside them; ReLU keeps NaN."""
    shape = (2, 17, 15, 18)
    for relu, at in itertools.product((False, True), [(0, 0, 0, 0), (1, 16, 14, 17), (0, 15, 7, 15), (1, 3, 8, 16)]):
        values = make_inputs(shape, k, DTYPES[dtype], False, channels_last, residual=True)
        grad = torch.randn(shape).to(DTYPES[dtype])
        for names in (['x'], ['grad'], ['residual'], ['x', 'grad'], ['residual', 'grad'], ['mean'], ['bias'], ['rstd']):
            twin = {name: value.clone() for name, value in {**values, 'grad': grad}.items()}
            for name in names:
                twin[name][at if name in ('x', 'grad', 'residual') else at[1]] = bad
            got, want = (run(f, twin, twin['grad'], relu) for f in (bnet, two_operators))
            for key in ('y', 'x') if names[0] in ('x', 'grad', 'residual') else ('y',):
                wrong = (positions(got[key]) != positions(want[key])).any(0).nonzero()
                assert not len(wrong), (names, key, relu, at, wrong)
                if dtype == 'float32':
                    torch.testing.assert_close(got[key], want[key], rtol=1e-3, atol=1e-3, equal_nan=True)


@compiled
@pytest.mark.parametrize('bad', [torch.nan, torch.inf], ids=str)
def test_nan_and_inf_in_batch_statistics(bad, monkeypatch):
    """One spoils its channel, as in batch norm, and no other."""
    layer = reference.randomise(BNET(5, 3))
    x = torch.randn(2, 5, 6, 7)
    x[1, 2, 3, 3] = bad
    results = []
    for backend in ('cpp', 'reference'):
        monkeypatch.setenv('BNET_MM_BACKEND', backend)
        twin, leaf = copy.deepcopy(layer), x.clone().requires_grad_()
        y = twin(leaf)
        (grad,) = torch.autograd.grad(y.nan_to_num().square().sum() + y[:, 2].sum(), leaf)
        results.append([y.isnan(), grad.isnan(), twin.norm.running_var.isfinite()])
    assert results[0][0][:, 2].all() and results[0][0].sum() == 2 * 6 * 7
    for got, want in zip(*results):
        assert torch.equal(got, want)


@pytest.mark.parametrize('per_sample', [False, True])
def test_empty_batch(per_sample):
    shape = (0, 3, 4, 5)
    values = make_inputs(shape, 3, torch.float32, per_sample, residual=True)
    for function in (bnet, bnet_reference):
        got = run(function, values, torch.empty(shape))
        assert got['y'].shape == got['x'].shape == shape
        assert all(got[name].shape == values[name].shape and not got[name].any() for name in PARAMETERS)
    assert moments(values['x'], False)[1].shape == (0, 3)


@compiled
@pytest.mark.parametrize('shape', [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0)])
def test_operators_take_empty_maps(shape):
    values = make_inputs(shape, 3, torch.float32)
    x, mean, rstd, weight, bias = (values[name] for name in NAMES[:5])
    ops = torch.ops.bnet_mm
    assert ops.forward(x, mean, rstd, weight, bias, None, True).shape == shape
    grads = ops.backward(x, x, mean, rstd, weight, True, True)
    assert [g.shape for g in grads] == [t.shape for t in (x, weight, bias, mean, rstd)]
    assert not any(g.any() for g in grads)
    ops.moments_backward(x, x, mean, mean, mean)
    assert ops.moments(x, True)[0].shape == shape[1:2]


@compiled
@pytest.mark.parametrize('wanted', ['mean', 'rstd', 'weight', 'bias', 'x'])
def test_gradient_of_one_argument_alone(wanted):
    """Each argument's gradient does not depend on which others are asked for."""
    values = make_inputs((2, 3, 7, 9), 3, torch.float32, False, False, False)
    names = ('x', 'mean', 'rstd', 'weight', 'bias')
    arguments = {name: values[name].detach().requires_grad_(name == wanted) for name in names}
    y = bnet(**arguments)
    grad = torch.randn_like(y)
    (got,) = torch.autograd.grad(y, [arguments[wanted]], grad)
    exact = {name: values[name].detach().double().requires_grad_(name == wanted) for name in names}
    (want,) = torch.autograd.grad(bnet_reference(**exact), [exact[wanted]], grad.double())
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
