"""Batch norm with its k x k depthwise transform, residual and ReLU as one operation: statistics, their running update
and the transform in one call, and one node for autograd. For eager mode; graphs and other norms use bnet.py.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from bnet_mm.ops.bnet import differentiable, fused_bnet, in_strides_of
from bnet_mm.ops.dispatch import transforms_active
from bnet_mm.ops.reference import bnet_reference, moments_reference
from bnet_mm.ops.schemas import wide_dtype


def fused_norm(
    backend: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    batch_statistics: bool,
    momentum: float,
    eps: float,
    residual: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """``act(DWConv_k((x - mean) / sqrt(var + eps)) + bias + residual)`` by the backend that select_backend has named.

    Differentiable in x, weight, bias and residual, any number of times.

    Args:
        backend: 'cpp' or 'triton'.
        x: (N, C, H, W) of more than one value per channel.
        weight, bias: Taps (C, 1, k, k) and (C,), float32 (float64 for float64).
        running_mean, running_var: (C,) of the same dtype. With ``batch_statistics`` they are moved towards those of x,
            by ``momentum``, unless None; else they take the place of these, and with None nothing is normalised.
        eps: Added to the variance.
        residual: Added before the activation, like x.
        relu: Whether act is ReLU, else the identity.

    Returns:
        (N, C, H, W) of x's dtype, and NCHW or channels_last as x.
    """
    arguments = (x, residual, weight, bias, running_mean, running_var, batch_statistics, momentum, eps, relu)
    if backend == 'cpp':  # csrc/autograd.cpp
        return torch.ops.bnet_mm.norm.default(*arguments)[0]
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in arguments[:4]):
        return _Norm.apply(*arguments)
    return _kernels().norm(*arguments)[0]


def fused_transform(
    backend: str, x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None, relu: bool = False
) -> Tensor:
    """``act(DWConv_k(x) + bias + residual)``: :func:`fused_norm` of a map that is normalised already.

    Args:
        weight, bias: As there, of any floating dtype.
    """
    weight, bias = (value.to(wide_dtype(x.dtype)) for value in (weight, bias))
    if torch.compiler.is_compiling():  # for graphs, in which the compiler makes these constants once
        zeros = torch.zeros_like(bias)
        return fused_bnet(x, zeros, torch.ones_like(bias), weight, bias, residual, relu)
    return fused_norm(backend, x, weight, bias, None, None, False, 0.0, 0.0, residual, relu)


@functools.cache
def _launchers() -> Any:
    from bnet_mm.ops.triton import launchers

    return launchers


def _kernels() -> Any:
    """Where norm and norm_backward are: without the dispatcher's time, unless somebody listens to it."""
    return torch.ops.bnet_mm if torch._C._len_torch_dispatch_stack() else _launchers()


class _Norm(torch.autograd.Function):
    """What csrc/autograd.cpp does, for CUDA."""

    @staticmethod
    def forward(ctx, *arguments):
        x, _, weight, _, _, _, ctx.batch_statistics, _, ctx.eps, relu = arguments
        y, mean, rstd = _kernels().norm(*arguments)
        ctx.save_for_backward(x, mean, rstd, weight, y if relu else None)
        return y

    @staticmethod
    def backward(ctx, grad):
        x, mean, rstd, weight, y = ctx.saved_tensors
        needs_x, needs_residual, needs_weight, needs_bias = ctx.needs_input_grad[:4]
        if torch.is_grad_enabled() or transforms_active(grad):
            masked = grad if y is None else grad.masked_fill(y <= 0, 0)

            def reference(x, weight):
                statistics = mean, rstd
                if ctx.batch_statistics:
                    of_x, var = moments_reference(x, over_batch=True)
                    statistics = of_x, (var + ctx.eps).rsqrt()
                return bnet_reference(x, *statistics, weight, torch.zeros_like(mean)).to(grad.dtype)

            grad_x = grad_weight = None
            if needs_x or needs_weight:
                grad_x, grad_weight = differentiable(reference, (x, weight), (needs_x, needs_weight), masked)
            grad_bias = masked.to(mean.dtype).sum((0, 2, 3)) if needs_bias else None
            return grad_x, masked if needs_residual else None, grad_weight, grad_bias, *[None] * 6
        grad_x, grad_weight, grad_bias, grad_residual = _kernels().norm_backward(
            grad, x, mean, rstd, weight, y, ctx.batch_statistics, needs_weight, needs_residual and y is not None
        )
        if needs_residual and y is None:
            grad_residual = grad
        grad_weight = in_strides_of(weight, grad_weight)
        return grad_x, grad_residual, grad_weight, grad_bias, *[None] * 6
