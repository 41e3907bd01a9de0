"""Normalisation with a k x k depthwise transform in one pass over the map, and the moments it needs.

Paper: Xu et al., arXiv 2011.14150, Algorithm 1. The two-operator form of the paper stores the normalised map between
its two operators; here it exists in a few line buffers only, and what is kept for the backward pass is the input and
numbers per channel.

The gradient of the input goes two ways: through the transform, and through the statistics, which takes from it what is
common to all pixels. Rounded before that, a gradient with a large common part would lose what is left. ``moments``
therefore returns a :class:`Map`, by which the first part comes to it in float32; it adds its own and rounds once, in
one elementwise pass: two passes over the map in all, as batch norm has, whatever is done with the moments.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bnet_mm.ops.dispatch import select_backend, transforms_active
from bnet_mm.ops.reference import bnet_reference, moments_reference
from bnet_mm.ops.schemas import check_devices, wide_dtype


class Map(NamedTuple):
    """A map whose moments were taken, to be given to :func:`bnet` and to nothing else.

    x: The map (N, C, H, W) itself.
    carrier: Zeros of x's shape that take no memory, in float32 at least; the gradient of x goes to them in its place,
        and from there to ``moments``. None if x itself is as wide and torch's own operators run.
    """

    x: Tensor
    carrier: Tensor | None


def bnet(
    x: Tensor | Map,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None = None,
    relu: bool = False,
    dilation: int = 1,
) -> Tensor:
    """``y = act(sum_j weight_j * x_hat_(i + j) + bias + residual)`` with ``x_hat = (x - mean) * rstd``, 0 off the map.

    Differentiable in all tensors, any number of times. Arithmetic is float32 (float64 for float64), rounded once.

    Args:
        x: (N, C, H, W), any strides; other strides than NCHW and channels_last are copied. Or what :func:`moments` has
            returned for it.
        mean, rstd: Mean and inverse standard deviation, (C,), or (N, C) for statistics of single samples.
        weight: Taps (C, 1, k, k), k odd.
        bias: (C,).
        residual: Added before the activation, (N, C, H, W) and of x's dtype.
        relu: Whether act is ReLU, else the identity.
        dilation: Spacing of the taps.

    Returns:
        y (N, C, H, W) of x's dtype, and NCHW or channels_last as x.

    Raises:
        ValueError: For other shapes, devices or dtypes; the message names the argument.
        BackendError: If BNET_MM_BACKEND names a backend that cannot run this.
    """
    whole, carrier = x if isinstance(x, Map) else (x, None)
    _check(whole, mean, rstd, weight, bias, residual)
    if select_backend(whole, weight.shape[-1], dilation) != 'reference':
        return fused_bnet(x, mean, rstd, weight, bias, residual, relu)
    if carrier is not None:
        y = bnet_reference(whole.detach() + carrier, mean, rstd, weight, bias, residual, relu, dilation)
        return y.to(whole.dtype)
    return bnet_reference(whole, mean, rstd, weight, bias, residual, relu, dilation)


def fused_bnet(
    x: Tensor | Map,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """:func:`bnet` by the compiled backend that :func:`select_backend` has named for x."""
    x, carrier = x if isinstance(x, Map) else (x, None)
    dtype = wide_dtype(x.dtype)
    # What is not differentiated may be a running buffer, which a later pass changes before the backward pass of this.
    mean, rstd = (t.to(dtype, copy=torch.is_grad_enabled() and not t.requires_grad) for t in (mean, rstd))
    return _Transform.apply(x, carrier, mean, rstd, weight.to(dtype), bias.to(dtype), residual, relu)


def moments(x: Tensor, over_batch: bool) -> tuple[Map, Tensor, Tensor]:
    """Mean and biased variance of each channel of x (N, C, H, W), over the batch or for each sample.

    Returns:
        The map for :func:`bnet`, mean and variance, (C,) or (N, C), float32 or float64.
    """
    if select_backend(x, 1) != 'reference':
        return fused_moments(x, over_batch)
    wide = x.to(wide_dtype(x.dtype))
    carrier = None if wide is x else wide - wide.detach()
    return (Map(x, carrier), *moments_reference(wide, over_batch))


def fused_moments(x: Tensor, over_batch: bool) -> tuple[Map, Tensor, Tensor]:
    """:func:`moments` by the compiled backend that :func:`select_backend` has named for x."""
    carrier, mean, var = _Moments.apply(x, over_batch)
    return Map(x, carrier), mean, var


def _check(x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None) -> None:
    if x.dim() != 4 or not x.is_floating_point():
        raise ValueError(f'bnet: x must be a floating-point (N, C, H, W), got {tuple(x.shape)} of {x.dtype}')
    n, c = x.shape[:2]
    k = weight.shape[-1] if weight.dim() == 4 else 0
    if tuple(weight.shape) != (c, 1, k, k) or k % 2 == 0:
        raise ValueError(f'bnet: weight must be ({c}, 1, k, k) with k odd, got {tuple(weight.shape)}')
    if tuple(mean.shape) not in ((c,), (n, c)) or mean.shape != rstd.shape:
        raise ValueError(
            f'bnet: mean and rstd must both be ({c},) or ({n}, {c}), got {tuple(mean.shape)} and {tuple(rstd.shape)}'
        )
    if tuple(bias.shape) != (c,):
        raise ValueError(f'bnet: bias must be ({c},), got {tuple(bias.shape)}')
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(
            f'bnet: residual must be {tuple(x.shape)} of {x.dtype} as x, got '
            f'{tuple(residual.shape)} of {residual.dtype}'
        )
    check_devices(x, mean=mean, rstd=rstd, weight=weight, bias=bias, residual=residual)


class _Transform(torch.autograd.Function):
    """The gradient of x, in float32 at least, is that of ``carrier`` if there is one."""

    @staticmethod
    def forward(ctx, x, carrier, mean, rstd, weight, bias, residual, relu):
        y = torch.ops.bnet_mm.forward(x, mean, rstd, weight, bias, residual, relu)
        ctx.carried = carrier is not None
        ctx.save_for_backward(x, mean, rstd, weight, bias, y if relu else None)
        return y

    @staticmethod
    def backward(ctx, grad):
        x, mean, rstd, weight, bias, y = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:-1])
        needs.pop(1)  # of a carrier, which is there where x needs one
        if y is not None:
            grad = torch.ops.aten.threshold_backward(grad, y.detach(), 0)  # a NaN lets it pass
        if torch.is_grad_enabled() or transforms_active(grad):

            def reference(x, mean, rstd, weight, bias):
                return bnet_reference(x, mean, rstd, weight, bias).to(grad.dtype)

            grads = differentiable(reference, (x, mean, rstd, weight, bias), needs, grad)
        else:
            grad_x, grad_weight, grad_bias, grad_mean, grad_rstd = torch.ops.bnet_mm.backward(
                grad, x, mean, rstd, weight, needs[3], needs[1] or needs[2], ctx.carried
            )
            grad_weight, grad_bias = in_strides_of(weight, grad_weight), in_strides_of(bias, grad_bias)
            grads = [grad_x, grad_mean, grad_rstd, grad_weight, grad_bias]
        grads.append(grad if needs[5] else None)
        grads.insert(0 if ctx.carried else 1, None)
        return *grads, None


class _Moments(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, over_batch):
        mean, var = torch.ops.bnet_mm.moments(x, over_batch)
        ctx.save_for_backward(x, mean)
        ctx.over_batch = over_batch
        return mean.new_zeros(()).expand(x.shape), mean, var

    @staticmethod
    def backward(ctx, grad, grad_mean, grad_var):
        x, mean = ctx.saved_tensors
        if torch.is_grad_enabled() or transforms_active(grad, grad_mean, grad_var):
            (through_moments,) = differentiable(
                lambda x: moments_reference(x, ctx.over_batch), (x,), (True,), (grad_mean, grad_var)
            )
            return (grad + through_moments).to(x.dtype), None
        if grad.dtype != x.dtype:
            return torch.ops.bnet_mm.moments_backward_rounded(grad, x, mean, grad_mean, grad_var), None
        torch.ops.bnet_mm.moments_backward(grad, x, mean, grad_mean, grad_var)  # nobody else has this gradient
        return grad, None


def in_strides_of(parameter: Tensor, grad: Tensor) -> Tensor:
    """DistributedDataParallel wants gradients in the strides of their parameters, those of a single element too."""
    return grad if grad.stride() == parameter.stride() else torch.empty_like(parameter).copy_(grad)


def differentiable(function, inputs, needs, grads) -> list[Tensor | None]:
    """Gradients of ``function`` in those ``inputs`` that need one, in float32 at least, by torch's own operators.

    They can be differentiated again, and have rules for every function transform.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Aliases, so that a gradient does not also flow from one input to another on which it depends.
        inputs = [tensor.to(wide_dtype(tensor.dtype)).view_as(tensor) for tensor in inputs]
        wanted = [tensor for tensor, need in zip(inputs, needs) if need]
        found = iter(torch.autograd.grad(function(*inputs), wanted, grads, create_graph=create_graph))
    return [next(found) if need else None for _, need in zip(inputs, needs)]
