"""The whole norm in one operation: values, gradients and running statistics, against float64 and torch's batch norm."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bnet_mm import BNET
from helpers import kernels, reference
from helpers.kernels import CHANNELS_LAST, DTYPES, SHAPES, Calls, compiled
from helpers.tools import python

EPS, MOMENTUM = 1e-3, 0.3
TOLERANCE = {torch.float32: 3e-6, torch.float64: 1e-12, torch.bfloat16: 8e-3}


def norm(x, residual, weight, bias, mean, var, batch_statistics, relu):
    arguments = (x, residual, weight, bias, mean, var, batch_statistics, MOMENTUM, EPS, relu)
    return torch.ops.bnet_mm.norm(*arguments)[0]


def formula(x, residual, weight, bias, mean, var, batch_statistics, relu):
    if batch_statistics:
        var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
    y = reference.depthwise((x - mean.view(-1, 1, 1)) / (var.view(-1, 1, 1) + EPS).sqrt(), weight, bias)
    y = y if residual is None else y + residual
    return y.clamp(min=0) if relu else y


def case(shape, dtype, k, channels_last, residual):
    """Inputs of which gradients are taken, None for no residual; running mean and variance."""
    values = kernels.make_inputs(shape, k, dtype, False, channels_last, residual)
    inputs = [values[name] for name in ('x', 'residual', 'weight', 'bias')]
    running = (
        torch.randn(shape[1], dtype=values['weight'].dtype),
        torch.rand(shape[1], dtype=values['weight'].dtype) + 0.5,
    )
    return [None if value is None else value.requires_grad_() for value in inputs], running


def differentiate(function, inputs, running, grad, *options):
    y = function(*inputs, *running, *options)
    present = [value for value in inputs if value is not None]
    return [y.detach(), *torch.autograd.grad(y, present, grad.to(y.dtype))]


@compiled
@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('k', [1, 3, 5, 7])
def test_equals_the_formula(k, dtype):
    """Both layouts, residual, ReLU, batch and running statistics in turn, maps of all sizes about bands and vectors."""
    dtype = DTYPES[dtype]
    for i, (shape, channels_last) in enumerate(itertools.product(SHAPES[k // 2 % 2 :: 2], (False, True))):
        batch_statistics = bool(i // 2 & 1) and shape[0] * shape[2] * shape[3] > 4
        residual, relu = bool(i // 4 & 1), bool(i // 8 & 1)
        inputs, running = case(shape, dtype, k, channels_last, residual)
        exact = [None if value is None else value.detach().double().requires_grad_() for value in inputs]
        of_double = [value.double() for value in running]
        # Near 0 the ReLU of an inexact form may be on the other side, which says nothing about its gradients.
        linear = formula(*exact, *of_double, batch_statistics, False)
        grad = (torch.randn(shape) * (linear.abs() > 0.1)).to(dtype)
        want = differentiate(formula, exact, of_double, grad, batch_statistics, relu)
        got = differentiate(norm, inputs, [value.clone() for value in running], grad, batch_statistics, relu)
        terms = (shape[0] * shape[2] * shape[3]) ** 0.5
        for value, expected in zip(got, want):
            # y and gradients of maps to their own size; sums over the maps to that of their terms
            size = max(1.0, expected.abs().max().item(), terms if value.dtype != dtype or value.dim() == 1 else 0)
            error = (value.double() - expected).abs().max().item() / size
            assert error <= TOLERANCE[dtype], (shape, channels_last, batch_statistics, residual, relu, error)
        assert got[1].stride() == inputs[0].stride()


@compiled
@pytest.mark.parametrize('layout', [torch.contiguous_format, CHANNELS_LAST])
@pytest.mark.parametrize('dtype', DTYPES)
def test_running_statistics_are_batch_norms(dtype, layout):
    """With mean and inverse standard deviation returned; evaluation reads them only."""
    dtype = DTYPES[dtype]
    wide = torch.promote_types(dtype, torch.float32)
    for shape in [(3, 5, 7, 6), (70, 3, 2, 1), (2, 19, 40, 33)]:
        plain = nn.BatchNorm2d(shape[1], EPS, MOMENTUM).double()
        weight, bias = torch.randn(shape[1], 1, 3, 3, dtype=wide), torch.randn(shape[1], dtype=wide)
        running = torch.zeros(shape[1], dtype=wide), torch.ones(shape[1] * 2, dtype=wide)[::2]  # any strides
        for step in range(3):
            x = (torch.randn(shape) * (1 + step) + 100).to(dtype).to(memory_format=layout)
            arguments = (x, None, weight, bias, *running, True, MOMENTUM, EPS, False)
            versions = [value._version for value in running]
            _, mean, rstd = torch.ops.bnet_mm.norm(*arguments)
            assert [value._version for value in running] == [version + 1 for version in versions]
            plain(x.double())
            var, exact = torch.var_mean(x.double(), (0, 2, 3), correction=0)
            torch.testing.assert_close(mean.double(), exact, rtol=1e-6, atol=0)
            torch.testing.assert_close(rstd.double(), (var + EPS).rsqrt(), rtol=1e-6, atol=0)
        for value, expected in zip(running, (plain.running_mean, plain.running_var)):
            torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-6)
        before = [value.clone() for value in running]
        _, mean, rstd = torch.ops.bnet_mm.norm(x, None, weight, bias, *running, False, MOMENTUM, EPS, False)
        assert all(map(torch.equal, running, before)) and mean.data_ptr() != running[0].data_ptr()
        torch.testing.assert_close((mean, rstd), (before[0], (before[1] + EPS).rsqrt()))


@compiled
@pytest.mark.parametrize('batch_statistics', [True, False])
@pytest.mark.parametrize('relu', [True, False])
def test_second_derivatives(relu, batch_statistics):
    inputs, running = case((2, 3, 4, 5), torch.float64, 3, False, True)

    def function(*inputs):
        return norm(*inputs, *(value.clone() for value in running), batch_statistics, relu)

    torch.autograd.gradcheck(function, inputs)
    torch.autograd.gradgradcheck(function, inputs)
    (grad,) = torch.autograd.grad(function(*inputs).sum(), inputs[0])
    assert not grad.requires_grad


@compiled
@pytest.mark.parametrize('dtype', DTYPES)
def test_without_statistics(dtype):
    """Neither of the batch nor running ones: the map is taken as it is."""
    dtype = DTYPES[dtype]
    for k, shape, channels_last in ((3, (2, 3, 9, 14), False), (5, (1, 17, 5, 6), True), (7, (2, 5, 8, 33), False)):
        inputs, _ = case(shape, dtype, k, channels_last, True)
        exact = [value.detach().double().requires_grad_() for value in inputs]
        x, residual, weight, bias = exact
        linear = reference.depthwise(x, weight, bias) + residual
        grad = (torch.randn(shape) * (linear.abs() > 0.1)).to(dtype)
        want = [linear.clamp(min=0), *torch.autograd.grad(linear.clamp(min=0), exact, grad.double())]
        got = differentiate(norm, inputs, (None, None), grad, False, True)
        for value, expected in zip(got, want):
            terms = (shape[0] * shape[2] * shape[3]) ** 0.5 if value.dtype != dtype or value.dim() == 1 else 1.0
            size = max(1.0, expected.abs().max().item(), terms)
            assert (value.double() - expected).abs().max().item() / size <= TOLERANCE[dtype]
        _, mean, rstd = torch.ops.bnet_mm.norm(*inputs, None, None, False, MOMENTUM, EPS, True)
        assert not mean.any() and (rstd == 1).all() and mean.shape == rstd.shape == shape[1:2]
    inputs, _ = case((2, 3, 4, 5), torch.float64, 3, False, True)
    torch.autograd.gradgradcheck(lambda *inputs: norm(*inputs, None, None, False, False), inputs)


@compiled
def test_only_what_is_wanted():
    """Gradients of some inputs; none at all outside of autograd."""
    inputs, running = case((2, 3, 9, 8), torch.float32, 5, False, True)
    everything = differentiate(norm, inputs, running, torch.ones(2, 3, 9, 8), False, True)[1:]
    for wanted in range(4):
        some = [value.detach().requires_grad_(i == wanted) for i, value in enumerate(inputs)]
        y = norm(*some, *running, False, True)
        assert torch.equal(torch.autograd.grad(y.sum(), some[wanted])[0], everything[wanted])
    assert not norm(*(value.detach() for value in inputs), *running, False, True).requires_grad
    with torch.no_grad():
        assert not norm(*inputs, *running, False, True).requires_grad


@compiled
def test_a_relu_lets_the_gradient_of_nan_pass():
    """As torch's; and an infinite gradient where y is 0 does not."""
    x = torch.randn(2, 3, 6, 7)
    x[0, 1, 2, 3] = torch.nan
    x.requires_grad_()
    residual = torch.zeros_like(x).requires_grad_()
    weight, bias = torch.zeros(3, 1, 3, 3), torch.full((3,), -1.0)
    weight[:, 0, 1, 1] = 1
    grad = torch.full_like(x, torch.inf)
    y = norm(x, residual, weight, bias, torch.zeros(3), torch.ones(3), False, True)
    (got,) = torch.autograd.grad(y, residual, grad)
    assert torch.equal(got, torch.where(y.detach() <= 0, 0.0, grad)) and got[0, 1, 2, 3] == torch.inf


@compiled
@pytest.mark.parametrize('change, message', [
    (dict(running_mean=None), 'running_mean and running_var must be given'),
    (dict(running_var=torch.ones(4)), r'running_var must be \(C,\)'),
    (dict(bias=torch.ones(2)), r'bias must be \(C,\)'),
    (dict(running_mean=torch.ones(3).double()), 'running_mean must be Float'),
    (dict(residual=torch.ones(2, 3, 4, 4)), 'residual must have the shape'),
    (dict(weight=torch.ones(3, 1, 3, 5)), r'weight must be \(C, 1, k, k\)'),
    (dict(x=torch.ones(0, 3, 4, 5), batch_statistics=True), 'x must not be empty'),
])  # fmt: skip
def test_errors(change, message):
    values = dict(x=torch.ones(2, 3, 4, 5), residual=None, weight=torch.ones(3, 1, 3, 3), bias=torch.ones(3),
                  running_mean=torch.ones(3), running_var=torch.ones(3), batch_statistics=False, momentum=0.1, eps=1e-5,
                  relu=False)  # fmt: skip
    with pytest.raises((ValueError, TypeError), match=f'bnet: {message}'):
        torch.ops.bnet_mm.norm(**{**values, **change})


@compiled
@pytest.mark.parametrize('training', [True, False])
def test_a_layer_calls_it_once(training):
    """And what it does not take goes by its parts."""
    x = torch.randn(3, 4, 6, 5)
    layers = {
        'norm': [BNET(4), BNET(4, 7, track_running_stats=False), BNET(4, norm='SyncBN'), BNET(4, momentum=0.0)],
        'forward': [BNET(4, dtype=torch.bfloat16), BNET(4, norm='IN'), BNET(4, momentum=None if training else 0.1)],
    }
    layers['forward'][2].norm.running_mean = layers['forward'][2].norm.running_mean.double()
    for name, some in layers.items():
        for layer in some:
            with Calls() as calls:
                layer.train(training)(x)
            assert calls.names.count(name) == 1 and set(calls.names) <= {name, 'moments'}, (name, layer)


@compiled
def test_the_layer_counts_batches_as_batch_norm_does():
    layer, plain, x = BNET(4), nn.BatchNorm2d(4), torch.randn(3, 4, 6, 5)
    for training, tracks in itertools.product((True, False), repeat=2):
        for module in (layer.norm, plain):
            module.train(training).track_running_stats = tracks
        layer(x)
        F.relu(plain(x))
        assert layer.norm.num_batches_tracked == plain.num_batches_tracked
        torch.testing.assert_close(layer.norm.running_var, plain.running_var)


IN_THE_INTERPRETER = """
import copy, os, torch
from bnet_mm import BNET
from helpers import reference

def differentiate(layer, backend, x, residual, relu):
    os.environ['BNET_MM_BACKEND'] = backend
    inputs = [x.clone().requires_grad_(), residual.clone().requires_grad_(), *layer.parameters()]
    y = layer(*inputs[:2], relu=relu)
    first = torch.autograd.grad((y * y.detach().cos()).sum(), inputs, create_graph=True)
    loss = sum(grad.square().sum() for grad in first)
    second = torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)
    once = torch.autograd.grad((layer(*inputs[:2], relu=relu) * y.detach().cos()).sum(), inputs)
    return [y, *first, *second, *once, *layer.buffers()]

for training, relu in ((True, True), (False, True), (True, False)):
    layer = reference.randomise(BNET(5, 3)).train(training)
    x, residual = torch.randn(2, 2, 5, 6, 7)
    exact = differentiate(copy.deepcopy(layer).double(), 'reference', x.double(), residual.double(), relu)
    for value, expected in zip(differentiate(layer, 'triton', x, residual, relu), exact, strict=True):
        torch.testing.assert_close(value.double(), expected.double(), rtol=1e-4, atol=1e-4)
"""


def test_the_same_on_triton():
    """In Triton's interpreter, where autograd is in Python: gradients, those of gradients, running statistics."""
    pytest.importorskip('triton', reason='Triton is not installed')
    done = python(IN_THE_INTERPRETER, TRITON_INTERPRET='1')
    assert done.returncode == 0, done.stderr
