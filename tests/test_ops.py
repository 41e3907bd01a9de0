"""The kernels of bnet_mm.ops: against float64, against the two operators of Algorithm 1, inside torch's machinery.

Which backend runs when is in test_dispatch.py, the GPU kernels are in test_triton.py.
"""

import copy
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import reference
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from bnet_mm import BNET
from bnet_mm.ops import bnet_reference
from bnet_mm.ops.bnet import bnet, moments
from bnet_mm.ops.dispatch import load_backend

BUILT, WHY = load_backend('cpp')
compiled = pytest.mark.skipif(not BUILT, reason=f'no C++ extension: {WHY}')
DOUBLE = {'dtype': torch.float64}
CHANNELS_LAST = torch.channels_last
PARAMETERS = ('mean', 'rstd', 'weight', 'bias')
NAMES = ('x', *PARAMETERS, 'residual')
DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16, 'float64': torch.float64}
# (N, C, H, W): all heights to 17, maps of 7 and 14 rows, widths about vector lengths, primes, k larger than the map,
# channels that are no multiple of a vector.
SHAPES = [
    *((2, 3, h, w) for h, w in zip(range(1, 18), (1, 2, 3, 5, 7, 11, 13, 14, 15, 16, 17, 19, 31, 29, 7, 14, 37))),
    *((1, 2, h, w) for h, w in zip((3, 9, 2, 6, 12, 1, 5, 4, 8, 11), (31, 63, 64, 65, 127, 128, 129, 130, 101, 211))),
    (3, 5, 1, 1), (1, 1, 22, 1), (2, 3, 23, 2), (1, 2, 1, 67), (2, 1, 7, 5), (2, 15, 5, 3), (1, 16, 14, 7),
    (2, 17, 3, 6), (1, 33, 6, 2), (1, 67, 2, 3), (2, 3, 57, 91), (1, 5, 64, 64),
]  # fmt: skip


class Calls(TorchDispatchMode):
    """Names of the operators of the extension that ran."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == 'bnet_mm':
            self.names.append(function.__name__.split('.')[0])
        return function(*args, **kwargs or {})


def make_inputs(shape, k, dtype=torch.float64, per_sample=False, channels_last=False, residual=False):
    """Random arguments of bnet; parameters are numbers of ``dtype``, so that a conv2d of that dtype has the same."""
    n, c = shape[:2]
    wide = torch.promote_types(dtype, torch.float32)
    numbers = (n, c) if per_sample else (c,)
    values = dict(
        x=(torch.randn(shape) * 1.5 + 0.7).to(dtype),
        mean=torch.randn(numbers, dtype=wide) * 0.5,
        rstd=torch.rand(numbers, dtype=wide) + 0.5,
        weight=(torch.randn(c, 1, k, k) / k).to(dtype).to(wide),
        bias=torch.randn(c).to(dtype).to(wide),
        residual=torch.randn(shape).to(dtype) if residual else None,
    )
    if channels_last:
        values['x'] = values['x'].contiguous(memory_format=CHANNELS_LAST)
    return values


def formula(x, mean, rstd, weight, bias, residual, relu):
    per_map = (-1, x.shape[1], 1, 1)
    y = reference.depthwise((x - mean.view(per_map)) * rstd.view(per_map), weight, bias)
    y = y if residual is None else y + residual
    return y.clamp(min=0) if relu else y


def two_operators(x, mean, rstd, weight, bias, residual, relu):
    """Algorithm 1 of the paper in the dtype of x: the normalised map is stored in that dtype."""
    per_map = (-1, x.shape[1], 1, 1)
    x_hat = ((x.to(mean.dtype) - mean.view(per_map)) * rstd.view(per_map)).to(x.dtype)
    y = F.conv2d(x_hat, weight.to(x.dtype), bias.to(x.dtype), padding=weight.shape[-1] // 2, groups=x.shape[1])
    y = y if residual is None else y + residual
    return y.relu() if relu else y


def run(function, values, grad, relu=False, dtype=None):
    """y, and the gradients of all arguments: name -> tensor."""
    tensors = [
        None if t is None else t.detach().to(dtype or t.dtype).requires_grad_() for t in (values[n] for n in NAMES)
    ]
    y = function(*tensors, relu)
    present = [name for name, tensor in zip(NAMES, tensors) if tensor is not None]
    grads = torch.autograd.grad(y, [t for t in tensors if t is not None], grad.to(y.dtype))
    return dict(y=y.detach(), **dict(zip(present, grads)))


def rms(x):
    return x.double().square().mean().sqrt().item()


def errors(shape, k, dtype, channels_last, variant):
    """Run one case; name -> (our error, the two operators'), in units in the last place of what is summed up."""
    per_sample, residual, relu = bool(variant & 1), bool(variant & 2), bool(variant & 4)
    values = make_inputs(shape, k, dtype, per_sample, channels_last, residual)
    exact = formula(*(None if values[n] is None else values[n].double() for n in NAMES), relu=False)
    # Near 0 the ReLU of an inexact form may be on the other side, which says nothing about its gradients.
    grad = (torch.randn(shape) * (exact.abs() > 0.1)).to(dtype)
    want = run(formula, values, grad, relu, torch.float64)
    got = run(bnet, values, grad, relu)
    theirs = run(two_operators, values, grad, relu)
    terms = shape[0] * shape[2] * shape[3]
    found = {}
    for name, exact in want.items():
        assert got[name].dtype == values['x' if name == 'y' else name].dtype
        size = terms**0.5 if name in PARAMETERS else max(rms(exact), 1e-30)
        found[name] = tuple(rms(y[name] - exact) / size / torch.finfo(y[name].dtype).eps for y in (got, theirs))
    return found


def check_errors(k, channels_last, dtype, shapes):
    """Output and every gradient; statistics of channels or samples, residual, ReLU in turn. Returns the ratios."""
    ours, theirs = {}, {}
    for i, shape in enumerate(shapes):
        for name, (our, their) in errors(shape, k, dtype, channels_last, (i + k // 2) % 8).items():
            # Theirs may be exact by chance where only a few numbers count; taken together they are not.
            chance = 32 if name in PARAMETERS or dtype == torch.float64 else 0.5
            assert our <= 4 * their + chance, (name, our, their, shape, k, dtype, channels_last, i)
            ours[name], theirs[name] = ours.get(name, 0) + our**2, theirs.get(name, 0) + their**2
    assert ours.pop('residual', 0) == 0
    ratios = {name: (value / max(theirs[name], 1e-9)) ** 0.5 for name, value in ours.items()}
    # The reference of float64 is in float64, too.
    assert dtype == torch.float64 or max(ratios.values()) <= 4, (ratios, k, dtype, channels_last)
    return ratios


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


SETS = {'default': 'generic', 'avx2': 'AVX2', 'avx512': 'AVX-512'}
CHECK_A_SET = """
import torch, test_ops
torch.manual_seed(0)
if torch.ops.bnet_mm.cpu_instruction_set() != {name!r}:
    raise SystemExit(77)
for i, (k, dtype, channels_last) in enumerate(test_ops.itertools.product((1, 3, 5, 7), test_ops.DTYPES, (0, 1))):
    test_ops.check_errors(k, bool(channels_last), test_ops.DTYPES[dtype], test_ops.SHAPES[i % 2 :: 2])
for case in test_ops.MOMENTS:
    test_ops.check_moments(*case)
"""


def python(code, **environment):
    """Run it in a fresh process beside this file; the finished process."""
    folder = Path(__file__).parent
    paths = os.pathsep.join([str(folder), str(folder.parent), os.environ.get('PYTHONPATH', '')])
    environment = {**os.environ, 'PYTHONPATH': paths, **environment}
    return subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=environment)


@compiled
@pytest.mark.parametrize('capability', SETS)
def test_instruction_sets(capability):
    """The same bounds with each set that this processor has; torch and the extension go by the same variable."""
    done = python(CHECK_A_SET.format(name=SETS[capability]), ATEN_CPU_CAPABILITY=capability)
    if done.returncode == 77:
        pytest.skip(f'this processor has no {SETS[capability]}')
    assert done.returncode == 0, done.stderr


# --- Moments


MOMENTS = [
    (shape, over_batch, channels_last)
    for shape in [(3, 5, 7, 11), (2, 17, 64, 65), (1, 3, 1, 2), (4, 33, 3, 1), (1, 2, 113, 127)]
    for over_batch in (True, False)
    for channels_last in (False, True)
]


def check_moments(shape, over_batch, channels_last):
    """At |mean| / std = 10000, where a difference of squares has no right digit left."""
    dims = (0, 2, 3) if over_batch else (2, 3)
    for dtype in DTYPES.values():
        x = (torch.randn(shape, **DOUBLE) + 1e4 * torch.randn(shape[1], 1, 1, **DOUBLE).sign()).to(dtype)
        if channels_last:
            x = x.contiguous(memory_format=CHANNELS_LAST)
        same, mean, var = moments(x, over_batch)
        assert same.x.data_ptr() == x.data_ptr() and mean.dtype == var.dtype == torch.promote_types(dtype, torch.float32)
        want = torch.var_mean(x.double(), dims, correction=0)
        theirs = torch.var_mean(x.to(mean.dtype), dims, correction=0)
        for got, their, exact in zip((var, mean), theirs, want):
            assert got.shape == exact.shape
            our, their = (got - exact).abs().max(), (their - exact).abs().max()
            # The reference of float64 is in float64, too: 1e4**2 units in the last place for the variance.
            chance = 8 * torch.finfo(got.dtype).eps * exact.abs().max() + 1e-8 * (dtype == torch.float64)
            assert our <= 10 * their + chance, (our, their, 'mean' if got is mean else 'var', shape, dtype)


@compiled
@pytest.mark.parametrize('shape, over_batch, channels_last', MOMENTS)
def test_moments_do_not_cancel(shape, over_batch, channels_last):
    check_moments(shape, over_batch, channels_last)


# --- Derivatives


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


# --- Strides, and what is left alone


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


HASHES = """
import hashlib, torch, test_ops
values = []
for threads in (1, 2, 2, 1):
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    parts = hashlib.sha256()
    for channels_last, dtype, k in test_ops.itertools.product((0, 1), test_ops.DTYPES.values(), (1, 3, 7)):
        for shape in [(3, 19, 14, 17), (1, 2, 57, 129), (8, 33, 7, 7)]:
            inputs = test_ops.make_inputs(shape, k, dtype, k == 3, bool(channels_last))
            got = test_ops.run(test_ops.bnet, inputs, torch.randn(shape).to(dtype), relu=True)
            got.update(enumerate(test_ops.moments(inputs['x'], k == 1)[1:]))
            layer = test_ops.reference.randomise(test_ops.BNET(shape[1], k))
            x = inputs['x'].requires_grad_()
            got.update(layer=torch.autograd.grad(layer(x).square().sum(), x)[0])
            for value in got.values():
                parts.update(value.detach().double().contiguous().numpy().tobytes())
    values.append(parts.hexdigest())
assert len(set(values)) == 1, values
"""


@compiled
def test_bit_equal_over_runs_and_numbers_of_threads():
    done = python(HASHES, OMP_NUM_THREADS='2')
    assert done.returncode == 0, done.stderr


# --- The memory of large maps is used again

HELD = torch.ops.bnet_mm.cpu_memory_held if BUILT else None
MIB = 2**20


def large_map(height, fill):
    """(1, 16, height, 512) in float32: height / 32 MiB. Every value of the result is ``fill``."""
    x = torch.full((1, 16, height, 512), float(fill))
    return torch.ops.bnet_mm.forward(x, *torch.tensor([[0.0], [1.0]]).expand(2, 16), torch.ones(16, 1, 1, 1),
                                     torch.zeros(16), None, False)  # fmt: skip


@compiled
def test_large_maps_share_no_memory():
    maps = [large_map(1100, fill) for fill in range(3)]
    del maps[1]
    assert HELD() >= 34 * MIB
    maps += [large_map(height, height) for height in (1100, 1060, 1100)]
    view = maps.pop(0)[0, 3, 5:, 7]  # keeps the whole memory alive
    maps += [large_map(1100, 7) for _ in range(2)]
    assert len({y.untyped_storage().data_ptr() for y in [view, *maps]}) == len(maps) + 1
    assert all((y == fill).all() for y, fill in zip([view, *maps], (0, 2, 1100, 1060, 1100, 7, 7), strict=True))


@compiled
def test_memory_held_is_used_again_and_bounded():
    maps = [large_map(1100, 1) for _ in range(9)]
    del maps
    held = HELD()
    assert 200 * MIB < held <= 256 * MIB  # not all nine
    y = large_map(1100, 2)
    assert HELD() == held - y.nbytes
    z = large_map(2048, 3)  # larger than all that is held
    assert HELD() == held - y.nbytes
    small = large_map(1024, 4)  # 32 MiB: malloc's
    assert HELD() == held - y.nbytes
    assert (y == 2).all() and (z == 3).all() and (small == 4).all()
    del y, z, small
    held = HELD()
    assert 64 * MIB < held <= 256 * MIB
    big = large_map(9000, 5)
    del big  # larger than the bound: it goes, the others stay
    assert HELD() == held


@compiled
def test_large_map_behaves_as_any_tensor(monkeypatch):
    y = large_map(1100, 1)
    assert y.is_contiguous() and y.storage_offset() == 0 and y.untyped_storage().nbytes() == y.nbytes
    y += 1
    z = y.clone()
    y.share_memory_()
    assert torch.equal(y, z) and y.is_shared()
    x = torch.randn(1, 16, 1100, 512).to(memory_format=torch.channels_last).requires_grad_()
    layer = BNET(16, k=3)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    inputs = [x, *layer.parameters()]
    y = layer(x)
    assert y.nbytes > 32 * MIB and y.is_contiguous(memory_format=torch.channels_last)
    got = torch.autograd.grad(y, inputs, y.detach() / 1000)
    monkeypatch.setenv('BNET_MM_BACKEND', 'reference')
    expected = layer(x)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got, torch.autograd.grad(expected, inputs, y.detach() / 1000), rtol=1e-3, atol=1e-3)


# --- NaN, infinity, nothing


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


# --- Memory


GUARDED = """
import ctypes, mmap, torch, test_ops
libc, page = ctypes.CDLL(None), mmap.PAGESIZE
libc.mmap.restype, pointer, size_t = ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t
libc.mmap.argtypes = [pointer, size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, size_t]
libc.mprotect.argtypes, libc.munmap.argtypes = [pointer, size_t, ctypes.c_int], [pointer, size_t]
mapped = []

def guarded(tensor, at_end):
    size = tensor.numel() * tensor.element_size()
    pages = -(-size // page)
    base = libc.mmap(None, (pages + 2) * page, 3, 0x22, -1, 0)  # read and write; private, anonymous
    mapped.append((base, (pages + 2) * page))
    for forbidden in (base, base + (pages + 1) * page):
        assert libc.mprotect(forbidden, page, 0) == 0
    start = base + page + (pages * page - size if at_end else 0)
    memory = (ctypes.c_char * size).from_address(start)
    return torch.frombuffer(memory, dtype=tensor.dtype).as_strided(tensor.shape, tensor.stride()).copy_(tensor)

ops, names = torch.ops.bnet_mm, test_ops.NAMES
if {overrun}:  # a map of two pages, of which one may be touched
    memory = (ctypes.c_char * (2 * page)).from_address(guarded(torch.ones(page // 4), True).data_ptr())
    x = torch.frombuffer(memory, dtype=torch.float32).view(1, 2, -1, 32)
    ops.forward(x, torch.zeros(2), torch.ones(2), torch.ones(2, 1, 3, 3), torch.zeros(2), None, False)
    raise SystemExit(1)
for i, (k, dtype, channels_last) in enumerate(test_ops.itertools.product((1, 3, 5, 7), test_ops.DTYPES, (0, 1))):
    for j, shape in enumerate(test_ops.SHAPES[i % 2 :: 2]):
        for at_end in (True, False):
            values = test_ops.make_inputs(shape, k, test_ops.DTYPES[dtype], j % 3 == 0, bool(channels_last), j % 2 == 0)
            x, mean, rstd, weight, bias, residual = (
                None if values[name] is None else guarded(values[name], at_end) for name in names
            )
            y = guarded(ops.forward(x, mean, rstd, weight, bias, residual, True), at_end)
            grad_x = guarded(ops.backward(y, x, mean, rstd, weight, True, True)[0], at_end)
            ops.moments(x, j % 2 == 0)
            ops.moments_backward(grad_x, x, mean, rstd, rstd)
            del x, mean, rstd, weight, bias, residual, y, grad_x
            while mapped:
                assert libc.munmap(*mapped.pop()) == 0
"""


@compiled
@pytest.mark.skipif(sys.platform != 'linux', reason='needs mmap of Linux')
def test_no_kernel_reads_outside_its_input():
    """Every input lies between two pages that nobody may touch, at the end or at the start of its own memory.

    AddressSanitizer does not see AVX-512's masked loads; this does. A deliberate overrun shows that it does.
    """
    for overrun in (False, True):
        done = python(GUARDED.format(overrun=overrun))
        assert done.returncode == (-11 if overrun else 0), done.stderr


# --- Errors


GOOD = dict(
    x=torch.ones(2, 3, 4, 5), mean=torch.ones(3), rstd=torch.ones(3), weight=torch.ones(3, 1, 3, 3), bias=torch.ones(3),
    residual=torch.ones(2, 3, 4, 5),
)  # fmt: skip
META = torch.empty(3, device='meta')


@pytest.mark.parametrize('name, value', [
    ('x', torch.ones(3, 4, 5)), ('x', torch.ones(2, 3, 4, 5).int()), ('mean', torch.ones(4)),
    ('rstd', torch.ones(2, 3)), ('mean', torch.ones(3, 1)), ('mean', META), ('rstd', META), ('bias', META),
    ('weight', torch.ones(3, 1, 2, 2)), ('weight', torch.ones(3, 1, 3, 5)), ('weight', torch.ones(4, 1, 3, 3)),
    ('weight', torch.ones(3, 3)), ('weight', torch.ones(3, 3, 3, 3)), ('bias', torch.ones(2)),
    ('weight', torch.ones(3, 1, 3, 3, device='meta')), ('bias', torch.tensor(1.0)),
    ('residual', torch.ones(2, 3, 4, 4)), ('residual', torch.ones(2, 3, 4, 5).double()),
    ('residual', torch.ones(2, 3, 4, 5, device='meta')),
])  # fmt: skip
def test_bad_argument_is_named(name, value):
    assert bnet(**GOOD).shape == (2, 3, 4, 5)
    with pytest.raises((ValueError, TypeError), match=rf'bnet: (mean and )?{name} (and rstd )?must'):
        bnet(**{**GOOD, name: value})


# Arguments of the operators themselves, and which tensors are maps, or have one number per channel.
OPERATORS = {
    'forward': dict(GOOD, relu=False),
    'backward': dict(
        grad=GOOD['x'], x=GOOD['x'], mean=GOOD['mean'], rstd=GOOD['rstd'], weight=GOOD['weight'], needs_weight=True,
        needs_statistics=True,
    ),
    'moments': dict(x=GOOD['x'], over_batch=True),
    'moments_backward': dict(
        grad_x=torch.zeros(2, 3, 4, 5), x=GOOD['x'], mean=GOOD['mean'], grad_mean=GOOD['mean'], grad_var=GOOD['mean']
    ),
}  # fmt: skip


def spoiled(name, value):
    """Wrong versions of one argument."""
    yield value[..., :0].sum(-1), 'shape'  # a dimension less
    if name != 'x':
        yield torch.cat([value, value]), 'shape'
        yield value.to('meta'), 'device'
    yield value.half(), 'dtype'
    if name != 'x':
        yield value.double(), 'dtype'


BAD_CALLS = [
    pytest.param(operator, name, wrong, id=f'{operator}-{name}-{what}-{i}')
    for operator, arguments in OPERATORS.items()
    for name, value in arguments.items()
    if isinstance(value, torch.Tensor)
    for i, (wrong, what) in enumerate(spoiled(name, value))
]


@compiled
@pytest.mark.parametrize('operator, name, wrong', BAD_CALLS)
def test_operators_refuse_before_they_touch_memory(operator, name, wrong):
    arguments = {key: v.clone() if isinstance(v, torch.Tensor) else v for key, v in OPERATORS[operator].items()}
    arguments[name] = wrong
    with pytest.raises((ValueError, TypeError), match=rf'bnet: .*{name}.* must'):
        getattr(torch.ops.bnet_mm, operator)(**arguments)
    if operator == 'moments_backward' and name != 'grad_x':
        assert not arguments['grad_x'].any()


@compiled
@pytest.mark.parametrize('k', [2, 9, 0])
def test_operators_refuse_other_kernel_sizes(k):
    with pytest.raises(ValueError, match='bnet: weight must be .* with k 1, 3, 5 or 7'):
        torch.ops.bnet_mm.forward(**{**OPERATORS['forward'], 'weight': torch.ones(3, 1, k, k)})
    grad_x = torch.zeros(2, 3, 5, 4).transpose(2, 3)
    with pytest.raises(ValueError, match='bnet: grad_x must be contiguous'):
        torch.ops.bnet_mm.moments_backward(**{**OPERATORS['moments_backward'], 'grad_x': grad_x})


# --- The layer: every normaliser on the kernels


LAYERS = {
    'BN': {}, 'BN plain average': dict(momentum=None), 'BN untracked': dict(track_running_stats=False),
    'SyncBN': dict(norm='SyncBN'), 'GN': dict(norm=dict(type='GN', num_groups=3)),
    'LN': dict(norm=dict(type='GN', num_groups=1)), 'IN': dict(norm='IN'), 'SN': dict(norm='SN'),
    'SN without BN': dict(norm=dict(type='SN', using_bn=False)), 'SyncSN': dict(norm='SyncSN'),
}  # fmt: skip
RUNS_WITHOUT_MOMENTS = ('BN', 'BN plain average', 'SyncBN')  # with running statistics


def learn(model, x, backend, monkeypatch, steps=2):
    """Forward and backward passes on a copy: what came out, and the operators that ran."""
    monkeypatch.setenv('BNET_MM_BACKEND', backend)
    model, out = copy.deepcopy(model), []
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
        frozen = mode != 'training' and name in RUNS_WITHOUT_MOMENTS
        one_pass = ['forward', 'backward'] if frozen else ['moments', 'forward', 'backward', 'moments_backward']
        assert calls == one_pass * 2 and none == []
        for a, b in zip(got, want):
            scale = max(1.0, b.abs().max().item())
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * scale)


@compiled
def test_cross_iteration_norm_runs_as_a_module(monkeypatch):
    """Its statistics depend on past inputs of the convolution before it."""
    model = reference.randomise(nn.Sequential(nn.Conv2d(3, 6, 3), BNET(6, 3, norm='CBN'))).double()
    x = torch.randn(4, 3, 9, 7, **DOUBLE)
    (got, calls), (want, _) = (learn(model, x, backend, monkeypatch) for backend in ('cpp', 'reference'))
    assert calls == ['forward', 'backward'] * 2  # the transform, of a map that is normalised before
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


HOOKS = ['register_forward_hook', 'register_forward_pre_hook', 'register_full_backward_hook']


@compiled
@pytest.mark.parametrize('kind', HOOKS)
@pytest.mark.parametrize('part', ['norm', 'bnconv', ''])
def test_hooks_are_called(part, kind, monkeypatch):
    """Of the parts: so they run one after the other; of the layer itself: so it may run in one pass."""
    layer = reference.randomise(BNET(3, 3)).double()
    x = torch.randn(2, 3, 5, 6, **DOUBLE)
    seen = []
    want, _ = learn(layer, x, 'cpp', monkeypatch)
    getattr(layer.get_submodule(part), kind)(lambda *arguments: seen.append(arguments[1]))
    got, calls = learn(layer, x, 'cpp', monkeypatch)
    assert len(seen) == 2 and ('moments' in calls) == (part == '')
    torch.testing.assert_close(got, want)
    if part == 'bnconv' and kind == 'register_forward_pre_hook':  # sees the normalised map
        torch.testing.assert_close(seen[0][0], F.batch_norm(x, None, None, training=True))


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


# --- Autocast, compilers, tracers, checkpointing


@pytest.mark.parametrize('backend', [pytest.param('cpp', marks=compiled), 'reference'])
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_autocast_does_not_lower_the_arithmetic(dtype, backend, monkeypatch):
    """The operation says how it computes; the dtype of the map is that of the result."""
    monkeypatch.setenv('BNET_MM_BACKEND', backend)
    values = make_inputs((2, 5, 7, 9), 3, DTYPES[dtype], residual=True)
    grad = torch.randn(2, 5, 7, 9).to(DTYPES[dtype])
    want = run(bnet, values, grad)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        got = run(bnet, values, grad)
        same, mean, var = moments(values['x'], True)
    assert all(torch.equal(got[name], value) for name, value in want.items())
    assert same.x.dtype == DTYPES[dtype] and mean.dtype == var.dtype == torch.float32


@compiled
@pytest.mark.parametrize('training', [True, False])
def test_model_under_autocast(training):
    """Outputs, gradients and statistics are near those in float32; parameters and statistics stay float32."""
    convs = [nn.Conv2d(3, 8, 3, bias=False), nn.Conv2d(8, 8, 1, bias=False)]
    model = reference.randomise(nn.Sequential(convs[0], BNET(8, 3), nn.ReLU(), convs[1], BNET(8, 5)))
    x, grad, results = torch.randn(4, 3, 12, 13), torch.randn(4, 8, 10, 11), []
    for enabled in (True, False):
        twin = copy.deepcopy(model).train(training)
        with Calls() as calls, torch.autocast('cpu', dtype=torch.bfloat16, enabled=enabled):
            y = twin(x)
        assert calls.names.count('forward') == 2 and y.dtype == (torch.bfloat16 if enabled else torch.float32)
        (y.float() * grad).sum().backward()
        results.append([y.float().detach(), *(p.grad for p in twin.parameters()), *twin.buffers()])
    for low, full in zip(*results):
        assert low.dtype == full.dtype and rms(low - full) <= 0.05 * rms(full) + 0.05


def small_model():
    layers = [nn.Conv2d(3, 4, 3), BNET(4, 3), nn.ReLU(), BNET(4, 5, norm='IN'), BNET(4, 7, norm='SyncBN')]
    return reference.randomise(nn.Sequential(*layers))


@pytest.mark.parametrize('training', [True, False])
def test_torch_compile(training):
    """In one graph, with the kernels inside: outputs, gradients and running statistics, twice."""
    model = small_model().train(training)
    twin = copy.deepcopy(model)
    fast = torch.compile(twin, backend='aot_eager', fullgraph=True)
    for step in range(2):
        x, runs = torch.randn(2, 3, 9, 10) + step, []
        for function in (model, fast):
            leaf = x.clone().requires_grad_()
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
                y = function(leaf)
                y.square().sum().backward()
            calls = sorted(event.name for event in profile.events() if event.name.startswith('bnet_mm::'))
            assert len(calls) == (0 if not BUILT else 12 if training else 8) or (step == 0 and function is fast), calls
            runs.append([y, leaf.grad])
        torch.testing.assert_close(*runs, rtol=1e-4, atol=1e-4)
    for (name, a), b in zip(model.named_parameters(), twin.parameters()):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4 * a.grad.abs().max().item(), msg=name)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(twin.state_dict()[name], value, msg=name)


@pytest.mark.skipif(not hasattr(torch.export, 'Dim'), reason='torch.export has no Dim before torch 2.2')
@pytest.mark.parametrize('strict', [True, False])
def test_torch_export_has_torchs_own_operators_only(strict):
    model = small_model().eval()
    x = torch.randn(2, 3, 9, 10)
    program = torch.export.export(model, (x,), strict=strict)
    targets = [str(node.target) for node in program.graph.nodes if node.op == 'call_function']
    assert targets and all(target.startswith('aten.') for target in targets), targets
    torch.testing.assert_close(program.module()(x), model(x))


@pytest.mark.parametrize('how', ['fx', 'jit'])
def test_tracers_see_torchs_own_operators_only(how):
    model = small_model().eval()
    x, other = torch.randn(2, 3, 9, 10), torch.randn(3, 3, 8, 11)
    model = model[:4] if how == 'fx' else model  # SyncBatchNorm looks at the shape of its input
    traced = torch.fx.symbolic_trace(model) if how == 'fx' else torch.jit.trace(model, x)
    with Calls() as calls:
        got = [traced(x), traced(other)]
    assert calls.names == []
    torch.testing.assert_close(got, [model(x), model(other)])


def test_torch_func():
    """torch.func.grad and vmap see torch's own operators, and agree with a loop over autograd."""
    layer = BNET(3, k=3).eval()
    for tensor in layer.state_dict().values():
        if tensor.is_floating_point():
            torch.nn.init.uniform_(tensor, 0.5, 2)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}
    x = torch.randn(4, 1, 3, 6, 5)

    def loss(parameters, x):
        return torch.func.functional_call(layer, parameters, (x,)).square().sum()

    grads = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for i in range(4):
        expected = torch.autograd.grad(layer(x[i]).square().sum(), layer.parameters())
        for name, grad in zip(parameters, expected, strict=True):
            torch.testing.assert_close(grads[name][i], grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('use_reentrant', [True, False])
def test_activation_checkpointing(use_reentrant):
    """Gradients are the same to the bit; statistics are updated once more, as those of BatchNorm2d are."""
    bn = reference.randomise(nn.BatchNorm2d(4))
    x, counts = torch.randn(2, 3, 8, 9), []
    for norm in (bn, BNET.from_norm(bn, 3)):
        norm.momentum = 0.1
        body = nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.ReLU())
        results = []
        for recompute in (False, True):
            twin, leaf = copy.deepcopy(body), x.clone().requires_grad_()
            y = checkpoint(twin, leaf, use_reentrant=use_reentrant) if recompute else twin(leaf)
            y.square().sum().backward()
            results.append([y.detach(), leaf.grad, *(p.grad for p in twin.parameters())])
        assert all(torch.equal(a, b) for a, b in zip(*results))
        layer = twin[1].norm if isinstance(twin[1], BNET) else twin[1]
        counts.append([layer.num_batches_tracked.item(), layer.running_mean.norm() > 0])
    assert counts[0] == counts[1] == [2, True]


# --- Fifty steps


class Block(nn.Module):
    def __init__(self, c, k):
        super().__init__()
        convs = [nn.Conv2d(c, c, 3, padding=1, bias=False) for _ in range(2)]
        self.body = nn.Sequential(convs[0], BNET(c, k), nn.ReLU(), convs[1], BNET(c, 3))

    def forward(self, x):
        return (x + self.body(x)).relu()


def train(model, noise, backend, monkeypatch):
    """Fifty steps of SGD on a fixed set of random images, which are off by ``noise``. Losses, and all weights."""
    monkeypatch.setenv('BNET_MM_BACKEND', backend)
    model = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.005, momentum=0.9, weight_decay=1e-4)
    data = torch.Generator().manual_seed(7)
    images, labels = torch.randn(64, 3, 16, 16, generator=data), torch.randint(10, (64,), generator=data)
    losses = []
    for _ in range(50):
        batch = torch.randperm(64, generator=data)[:32]
        x = images[batch] * (1 + noise * torch.randn(32, 3, 16, 16))
        loss = F.cross_entropy(model(x), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses), torch.cat([v.flatten() for v in model.state_dict().values() if v.is_floating_point()])


@compiled
def test_fifty_steps_stay_within_rounding_growth(monkeypatch):
    """Losses and weights move at most 10 x as far off the reference path as by one rounding of the images."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), BNET(8, 3), nn.ReLU(), Block(8, 5), Block(8, 3), nn.MaxPool2d(2),
        Block(8, 7), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10),
    )  # fmt: skip
    losses, weights = train(model, 0.0, 'reference', monkeypatch)
    rounded_losses, rounded = train(model, 1e-7, 'reference', monkeypatch)
    with Calls() as calls:
        fast_losses, fast = train(model, 0.0, 'cpp', monkeypatch)
    assert calls.names.count('forward') == 50 * 7
    assert losses[-5:].mean() < 0.7 * losses[0] and fast_losses[-5:].mean() < 0.7 * fast_losses[0]
    growth, change = (rounded - weights).norm(), (fast - weights).norm()
    assert 0 < growth < 0.01 * weights.norm() and change <= 10 * growth, (growth, change)
    growth, change = (rounded_losses - losses).abs().max(), (fast_losses - losses).abs().max()
    assert change <= 10 * growth, (growth, change)
