"""The operators ``torch.ops.bnet_mm.*`` that the compiled backends implement, and their shapes for torch.compile.

None of them is differentiable by itself; bnet.py joins them to autograd. ``norm`` is batch norm with its transform in
one operation, for eager mode; the others are its parts, from which other norms and graphs are built.
"""

from __future__ import annotations

import torch
from torch import Tensor

LIBRARY = torch.library.Library('bnet_mm', 'FRAGMENT')
LIBRARY.define(
    'forward(Tensor x, Tensor mean, Tensor rstd, Tensor weight, Tensor bias, Tensor? residual, bool relu) -> Tensor'
)
LIBRARY.define(
    'backward(Tensor grad, Tensor x, Tensor mean, Tensor rstd, Tensor weight, bool needs_weight, bool needs_statistics,'
    ' bool wide_grad_x=False)'
    ' -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias, Tensor grad_mean, Tensor grad_rstd)'
)
LIBRARY.define('moments(Tensor x, bool over_batch) -> (Tensor mean, Tensor var)')
LIBRARY.define('moments_backward(Tensor(a!) grad_x, Tensor x, Tensor mean, Tensor grad_mean, Tensor grad_var) -> ()')
# The same for a grad that is wider than x, rounded to x's dtype.
LIBRARY.define(
    'moments_backward_rounded(Tensor grad, Tensor x, Tensor mean, Tensor grad_mean, Tensor grad_var) -> Tensor grad_x'
)
# Statistics of the batch, which update the running ones if these are given, or else the running ones, or without these
# mean 0 and rstd 1; then forward.
LIBRARY.define(
    'norm(Tensor x, Tensor? residual, Tensor weight, Tensor bias, Tensor(a!)? running_mean, Tensor(b!)? running_var,'
    ' bool batch_statistics, float momentum, float eps, bool relu) -> (Tensor y, Tensor mean, Tensor rstd)'
)
# y is given where a ReLU has made it: it masks grad.
LIBRARY.define(
    'norm_backward(Tensor grad, Tensor x, Tensor mean, Tensor rstd, Tensor weight, Tensor? y, bool batch_statistics,'
    ' bool needs_weight, bool needs_residual)'
    ' -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias, Tensor? grad_residual)'
)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics and of all arithmetic for maps of ``dtype``."""
    return torch.promote_types(dtype, torch.float32)


def like_map(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An empty tensor as the kernels return it: NCHW or channels_last as x, contiguous for any other strides."""
    channels_last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty_like(x, dtype=dtype, memory_format=memory_format)


def check_devices(x: Tensor, **others: Tensor | None) -> None:
    """Raise a ValueError unless all are on one device: with a meta tensor among them, the functions below would run."""
    for name, tensor in others.items():
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f'bnet: {name} must be on {x.device} as x, got {tensor.device}')


@torch.library.impl(LIBRARY, 'forward', 'Meta')
def _(x, mean, rstd, weight, bias, residual, relu):
    check_devices(x, mean=mean, rstd=rstd, weight=weight, bias=bias, residual=residual)
    return like_map(x)


@torch.library.impl(LIBRARY, 'backward', 'Meta')
def _(grad, x, mean, rstd, weight, needs_weight, needs_statistics, wide_grad_x=False):
    check_devices(x, grad=grad, mean=mean, rstd=rstd, weight=weight)
    grad_x = like_map(x, wide_dtype(x.dtype) if wide_grad_x else None)
    numbers = weight.new_empty(weight.shape[0])
    return grad_x, weight.new_empty(weight.shape), numbers, torch.empty_like(mean), torch.empty_like(rstd)


@torch.library.impl(LIBRARY, 'moments', 'Meta')
def _(x, over_batch):
    shape = x.shape[1:2] if over_batch else x.shape[:2]
    return x.new_empty(shape, dtype=wide_dtype(x.dtype)), x.new_empty(shape, dtype=wide_dtype(x.dtype))


@torch.library.impl(LIBRARY, 'moments_backward', 'Meta')
def _(grad_x, x, mean, grad_mean, grad_var):
    check_devices(x, grad_x=grad_x, mean=mean, grad_mean=grad_mean, grad_var=grad_var)


@torch.library.impl(LIBRARY, 'moments_backward_rounded', 'Meta')
def _(grad, x, mean, grad_mean, grad_var):
    check_devices(x, grad=grad, mean=mean, grad_mean=grad_mean, grad_var=grad_var)
    return like_map(x)


@torch.library.impl(LIBRARY, 'norm', 'Meta')
def _(x, residual, weight, bias, running_mean, running_var, batch_statistics, momentum, eps, relu):
    running = dict(running_mean=running_mean, running_var=running_var)
    check_devices(x, residual=residual, weight=weight, bias=bias, **running)
    mean, rstd = (x.new_empty(x.shape[1], dtype=wide_dtype(x.dtype)) for _ in range(2))
    return like_map(x), mean, rstd


@torch.library.impl(LIBRARY, 'norm_backward', 'Meta')
def _(grad, x, mean, rstd, weight, y, batch_statistics, needs_weight, needs_residual):
    check_devices(x, grad=grad, mean=mean, rstd=rstd, weight=weight, y=y)
    grad_residual = like_map(x) if needs_residual else None
    return like_map(x), weight.new_empty(weight.shape), weight.new_empty(weight.shape[0]), grad_residual
