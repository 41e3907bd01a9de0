"""Normalisation with a k x k depthwise transform in one pass over the map, and the moments it needs.

Paper: Xu et al., arXiv 2011.14150, Algorithm 1. The two-operator form of the paper stores the normalised map between
its two operators; here it exists in a few line buffers only, and what is kept for the backward pass is the input and
numbers per channel.

The gradient of the input goes two ways: through the transform, and through the statistics. ``moments`` therefore
returns its input a second time. Who uses that tensor sends its gradient back through ``moments``, which adds its own
part in place, in one elementwise pass: two passes over the map in all, as batch norm has, whatever is done with the
moments.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bnet_mm.ops.dispatch import select_backend
from bnet_mm.ops.reference import bnet_reference, moments_reference
from bnet_mm.ops.schemas import check_devices, wide_dtype


def bnet(
    x: Tensor,
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
        x: (N, C, H, W), any strides; other strides than NCHW and channels_last are copied.
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
    _check(x, mean, rstd, weight, bias, residual)
    if select_backend(x, weight.shape[-1], dilation) == 'reference':
        return bnet_reference(x, mean, rstd, weight, bias, residual, relu, dilation)
    return fused_bnet(x, mean, rstd, weight, bias, residual, relu)


def fused_bnet(
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """:func:`bnet` by the compiled backend that :func:`select_backend` has named for x."""
    dtype = wide_dtype(x.dtype)
    numbers = (tensor.to(dtype) for tensor in (mean, rstd, weight, bias))
    return _Transform.apply(x, *numbers, residual, relu)


def moments(x: Tensor, over_batch: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and biased variance of each channel of x (N, C, H, W), over the batch or for each sample.

    For the layers only: the first return value is easily misused.

    Returns:
        x itself, mean and variance, (C,) or (N, C), float32 or float64. Give the returned x, and not the argument, to
        :func:`bnet` and to nothing else: the backward pass adds the gradient through the moments to its gradient in
        place.
    """
    if select_backend(x, 1) == 'reference':
        return (x, *moments_reference(x, over_batch))
    return fused_moments(x, over_batch)


def fused_moments(x: Tensor, over_batch: bool) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`moments` by the compiled backend that :func:`select_backend` has named for x."""
    return _Moments.apply(x, over_batch)


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
    @staticmethod
    def forward(ctx, x, mean, rstd, weight, bias, residual, relu):
        y = torch.ops.bnet_mm.forward(x, mean, rstd, weight, bias, residual, relu)
        ctx.save_for_backward(x, mean, rstd, weight, bias, residual if relu else None, y if relu else None)
        return y

    @staticmethod
    def backward(ctx, grad):
        x, mean, rstd, weight, bias, residual, y = ctx.saved_tensors
        needs = ctx.needs_input_grad
        if torch.is_grad_enabled():  # create_graph: what is differentiated again is the reference
            inputs = (x, mean, rstd, weight, bias, residual)
            grads = _differentiable(lambda *tensors: bnet_reference(*tensors, y is not None), inputs, needs, grad)
            return *grads[:5], grads[5] if y is not None else (grad if needs[5] else None), None
        if y is not None:
            grad = grad.masked_fill(y <= 0, 0)  # a NaN lets it pass, as in torch
        needs_statistics = needs[1] or needs[2]
        grads = torch.ops.bnet_mm.backward(grad, x, mean, rstd, weight, needs[3], needs_statistics)
        grad_x, grad_weight, grad_bias, grad_mean, grad_rstd = grads
        return grad_x, grad_mean, grad_rstd, grad_weight, grad_bias, grad if needs[5] else None, None


class _Moments(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, over_batch):
        mean, var = torch.ops.bnet_mm.moments(x, over_batch)
        ctx.save_for_backward(x, mean)
        ctx.over_batch = over_batch
        return x.view_as(x), mean, var

    @staticmethod
    def backward(ctx, grad_x, grad_mean, grad_var):
        x, mean = ctx.saved_tensors
        if torch.is_grad_enabled():
            grads = _differentiable(
                lambda x: moments_reference(x, ctx.over_batch), (x,), (True,), (grad_mean, grad_var)
            )
            return grad_x + grads[0], None
        torch.ops.bnet_mm.moments_backward(grad_x, x, mean, grad_mean, grad_var)
        return grad_x, None


def _differentiable(function, inputs, needs, grads) -> list[Tensor | None]:
    """Gradients of ``function`` in those ``inputs`` that need one, by torch's own operators."""
    # Aliases, so that a gradient does not also flow from one input to another on which it depends.
    inputs = [None if tensor is None else tensor.view_as(tensor) for tensor in inputs]
    wanted = [tensor for tensor, need in zip(inputs, needs) if need and tensor is not None]
    found = torch.autograd.grad(function(*inputs), wanted, grads, create_graph=True)
    found = iter(found)
    return [next(found) if need and tensor is not None else None for tensor, need in zip(inputs, needs)]
