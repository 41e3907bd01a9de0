"""The functions of csrc/bnet_cpu.cpp for CUDA tensors (interpreted: any) of at least one element."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from bnet_mm.ops.limits import KERNEL_SIZES, TRITON_DTYPES
from bnet_mm.ops.schemas import like_map
from bnet_mm.ops.triton.kernels import (
    add_partials_kernel,
    backward_kernel,
    forward_kernel,
    join_moments_kernel,
    moments_backward_kernel,
    moments_kernel,
)
from bnet_mm.ops.triton.plans import parts, pixel_tile, plan_pixels, plan_windows, warps


def forward(
    x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, relu: bool
) -> Tensor:
    k = _check(x, dict(mean=mean, rstd=rstd), weight, bias, dict(residual=residual))
    y = like_map(x)
    channels_last = _is_channels_last(y)
    x = _in_format(x, channels_last)
    residual = None if residual is None else _in_format(residual, channels_last)
    mean, rstd, bias = mean.contiguous(), rstd.contiguous(), bias.contiguous()
    taps, steps = _taps(weight, channels_last)
    plan = plan_windows(x.shape, k, channels_last, x.element_size(), by_sample=False)
    with _device(x):
        forward_kernel[(plan.programs,)](
            x, mean, rstd, taps, bias, x if residual is None else residual, y, *x.shape, _sample_step(mean), *steps,
            plan.column_tiles, plan.tiles, plan.strips, plan.rows_each, plan.samples_each, k, *plan.tile, channels_last,
            residual is not None, relu, num_warps=warps(plan.tile),
        )  # fmt: skip
    return y


def backward(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    needs_weight: bool,
    needs_statistics: bool,
    wide_grad_x: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    k = _check(x, dict(mean=mean, rstd=rstd), weight, None, dict(grad=grad))
    grad_x = like_map(x, torch.float32 if wide_grad_x else None)
    channels_last = _is_channels_last(grad_x)
    x, grad = _in_format(x, channels_last), _in_format(grad, channels_last)
    mean, rstd = mean.contiguous(), rstd.contiguous()
    taps, steps = _taps(weight, channels_last)
    by_sample = mean.dim() == 2
    plan = plan_windows(x.shape, k, channels_last, x.element_size(), by_sample)
    channels, rows = x.shape[1], plan.groups * plan.strips * plan.column_tiles
    partial = mean.new_empty(rows, k * k + 3, channels)
    grad_weight, grad_bias = weight.new_empty(weight.shape), mean.new_empty(channels)
    grad_mean, grad_rstd = torch.empty_like(mean), torch.empty_like(rstd)
    samples = plan.groups if by_sample else 1
    with _device(x):
        backward_kernel[(plan.programs,)](
            grad, x, mean, rstd, taps, grad_x, partial, *x.shape, _sample_step(mean), *steps, plan.column_tiles,
            plan.tiles, plan.strips, plan.rows_each, plan.samples_each, k, *plan.tile, channels_last, needs_weight,
            needs_statistics, num_warps=warps(plan.tile),
        )  # fmt: skip
        add_partials_kernel[(k * k + 3, parts(channels, 64))](
            partial, grad_weight, grad_bias, grad_mean, grad_rstd, samples, channels, rows // samples, k * k,
            needs_weight, needs_statistics, BLOCK=64, DEPTH=8,
        )  # fmt: skip
    return grad_x, grad_weight, grad_bias, grad_mean, grad_rstd


def moments(x: Tensor, over_batch: bool) -> tuple[Tensor, Tensor]:
    _check(x, {}, None, None, {})
    channels_last = _is_channels_last(x)
    x = _in_format(x, channels_last)
    samples, channels, height, width = x.shape
    plan = plan_pixels(x.shape, channels_last, by_sample=not over_batch)
    tile = plan.tile
    lines = parts(height * width, tile.outer if channels_last else tile.inner)
    partial = x.new_empty(plan.groups, plan.strips, 3, channels, dtype=torch.float32)
    mean = partial.new_empty((channels,) if over_batch else (samples, channels))
    var = torch.empty_like(mean)
    with _device(x):
        moments_kernel[(plan.programs,)](
            x, partial, channels, height * width, lines, plan.tiles, plan.strips, plan.rows_each,
            lines * plan.samples_each, tile.outer, tile.inner, tile.rows, channels_last, num_warps=warps(tile),
        )  # fmt: skip
        join_moments_kernel[(plan.groups, parts(channels, 64))](
            partial, mean, var, channels, plan.strips, BLOCK=64, DEPTH=8
        )
    return mean, var


def moments_backward(grad_x: Tensor, x: Tensor, mean: Tensor, grad_mean: Tensor, grad_var: Tensor) -> None:
    _check(x, dict(mean=mean, grad_mean=grad_mean, grad_var=grad_var), None, None, dict(grad_x=grad_x))
    channels_last = _is_channels_last(grad_x)
    if not channels_last and not grad_x.is_contiguous():
        raise ValueError('bnet: grad_x must be contiguous, NCHW or channels_last')
    _add_moments(grad_x, grad_x, _in_format(x, channels_last), mean, grad_mean, grad_var, channels_last)


def moments_backward_rounded(grad: Tensor, x: Tensor, mean: Tensor, grad_mean: Tensor, grad_var: Tensor) -> Tensor:
    _check(x, dict(mean=mean, grad_mean=grad_mean, grad_var=grad_var), None, None, dict(grad=grad), torch.float32)
    grad_x = like_map(x)
    channels_last = _is_channels_last(grad_x)
    x, grad = _in_format(x, channels_last), _in_format(grad, channels_last)
    _add_moments(grad, grad_x, x, mean, grad_mean, grad_var, channels_last)
    return grad_x


def _add_moments(
    grad: Tensor, grad_x: Tensor, x: Tensor, mean: Tensor, grad_mean: Tensor, grad_var: Tensor, channels_last: bool
) -> None:
    mean, grad_mean, grad_var = mean.contiguous(), grad_mean.contiguous(), grad_var.contiguous()
    samples, channels, height, width = x.shape
    by_sample = mean.dim() == 2
    tile = pixel_tile(channels, height * width, channels_last)
    tiles = parts(channels, tile.inner if channels_last else tile.outer)
    lines = parts(height * width, tile.outer if channels_last else tile.inner)
    count = height * width * (1 if by_sample else samples)
    depth = 4  # lines of a program: enough loads under way
    with _device(x):
        moments_backward_kernel[(tiles * parts(samples * lines, depth),)](
            grad, grad_x, x, mean, grad_mean, grad_var, float(count), channels, height * width, lines, samples * lines,
            tiles, tile.outer, tile.inner, depth, channels_last, by_sample, num_warps=warps(tile),
        )  # fmt: skip


def _check(
    x: Tensor,
    numbers: dict[str, Tensor],
    weight: Tensor | None,
    bias: Tensor | None,
    maps: dict[str, Tensor | None],
    maps_dtype: torch.dtype | None = None,
) -> int:
    """The size of the taps, 0 without any. Each refusal names the argument, before any kernel runs."""
    if x.dim() != 4 or not x.numel():
        raise ValueError(f'bnet: x must be 4-D (N, C, H, W) and not empty, got shape {tuple(x.shape)}')
    if x.dtype not in TRITON_DTYPES:
        raise TypeError(f'bnet: x must be float32, float16 or bfloat16, got {x.dtype}')
    n, c = x.shape[:2]
    k = weight.shape[-1] if weight is not None and weight.dim() else 0
    if weight is not None and k not in KERNEL_SIZES:
        raise ValueError(f'bnet: weight must be ({c}, 1, k, k) with k 1, 3, 5 or 7, got {tuple(weight.shape)}')
    first = next(iter(numbers.values()), x)
    shapes: dict[str, tuple[Tensor | None, tuple[int, ...], torch.dtype]]
    shapes = {name: (tensor, tuple(first.shape), torch.float32) for name, tensor in numbers.items()}
    shapes.update({name: (tensor, tuple(x.shape), maps_dtype or x.dtype) for name, tensor in maps.items()})
    shapes.update(weight=(weight, (c, 1, k, k), torch.float32), bias=(bias, (c,), torch.float32))
    if numbers and tuple(first.shape) not in ((c,), (n, c)):
        raise ValueError(f'bnet: {next(iter(numbers))} must be ({c},) or ({n}, {c}), got {tuple(first.shape)}')
    for name, (tensor, shape, dtype) in shapes.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape or tensor.device != x.device:
            raise ValueError(
                f'bnet: {name} must be {shape} on {x.device}, got {tuple(tensor.shape)} on {tensor.device}'
            )
        if tensor.dtype != dtype:
            raise TypeError(f'bnet: {name} must be {dtype} for x of {x.dtype}, got {tensor.dtype}')
    return k


def _is_channels_last(x: Tensor) -> bool:
    return not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def _in_format(x: Tensor, channels_last: bool) -> Tensor:
    """Any other strides are copied."""
    return x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def _taps(weight: Tensor, channels_last: bool) -> tuple[Tensor, tuple[int, int]]:
    """Taps as lanes read them, neighbouring channels side by side in channels_last; the steps of channels and taps."""
    channels, count = weight.shape[0], weight.shape[-1] ** 2
    taps = weight.reshape(channels, count)
    return (taps.t().contiguous(), (1, channels)) if channels_last else (taps.contiguous(), (count, 1))


def _sample_step(numbers: Tensor) -> int:
    return numbers.shape[1] if numbers.dim() == 2 else 0


def _device(x: Tensor):
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
