"""Cases for the kernels of bnet_mm.ops, and how exact they must be: float64, and the two operators of Algorithm 1."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from bnet_mm.ops.bnet import bnet, moments
from bnet_mm.ops.dispatch import load_backend
from helpers import reference

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
        assert same.x.data_ptr() == x.data_ptr() and mean.dtype == var.dtype == torch.promote_types(
            dtype, torch.float32
        )
        want = torch.var_mean(x.double(), dims, correction=0)
        theirs = torch.var_mean(x.to(mean.dtype), dims, correction=0)
        for got, their, exact in zip((var, mean), theirs, want):
            assert got.shape == exact.shape
            our, their = (got - exact).abs().max(), (their - exact).abs().max()
            # The reference of float64 is in float64, too: 1e4**2 units in the last place for the variance.
            chance = 8 * torch.finfo(got.dtype).eps * exact.abs().max() + 1e-8 * (dtype == torch.float64)
            assert our <= 10 * their + chance, (our, their, 'mean' if got is mean else 'var', shape, dtype)
