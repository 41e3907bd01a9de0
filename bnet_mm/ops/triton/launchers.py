"""The functions of csrc/bnet_cpu.cpp for CUDA tensors (interpreted: any) of at least one element."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from bnet_mm.ops.limits import KERNEL_SIZES, TRITON_DTYPES
from bnet_mm.ops.schemas import like_map
from bnet_mm.ops.triton import kernels
from bnet_mm.ops.triton.launch import Launch
from bnet_mm.ops.triton.plans import COLUMNS, PixelPlan, WindowPlan, parts, plan_pixels, plan_windows, power_of_two

LANES = 128  # of a program of the joining kernels


class BackwardFlags(NamedTuple):
    """What of the backward pass is wanted of a launch; see backward_kernel."""

    sums: bool = False
    weight: bool = False
    statistics: bool = False
    grad_x: bool = False
    through_statistics: bool = False
    relu: bool = False
    residual: bool = False


def forward(
    x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, relu: bool
) -> Tensor:
    _check(x, dict(mean=mean, rstd=rstd), weight, bias, dict(residual=residual))
    y = like_map(x)
    channels_last = _is_channels_last(y)
    x = _in_format(x, channels_last)
    residual = None if residual is None else _in_format(residual, channels_last)
    mean, rstd, weight, bias = mean.contiguous(), rstd.contiguous(), weight.contiguous(), bias.contiguous()
    launch = _forward(_layout(x, weight), mean.dim() == 2, residual is not None, relu)
    launch(x, mean, rstd, weight, bias, x if residual is None else residual, y, mean, rstd, numbers=(0.0,))
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
    _check(x, dict(mean=mean, rstd=rstd), weight, None, dict(grad=grad))
    grad_x = like_map(x, torch.float32 if wide_grad_x else None)
    channels_last = _is_channels_last(grad_x)
    x, grad = _in_format(x, channels_last), _in_format(grad, channels_last)
    mean, rstd, weight = mean.contiguous(), rstd.contiguous(), weight.contiguous()
    layout, by_sample = _layout(x, weight), mean.dim() == 2
    partial = _rows_of_sums(layout, by_sample, weight)
    flags = BackwardFlags(sums=True, weight=needs_weight, statistics=needs_statistics, grad_x=True)
    launch = _backward(layout, by_sample, flags, grad_x.dtype)
    launch(grad, x, x, mean, rstd, weight, mean, rstd, grad_x, grad_x, partial)
    return grad_x, *_add_partials(partial, mean, rstd, weight, needs_weight)


def norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    batch_statistics: bool,
    momentum: float,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    if (running_mean is None) != (running_var is None):
        raise ValueError('bnet: running_mean and running_var must be given, both or neither')
    running = {}
    if running_mean is not None and running_var is not None:
        running = dict(running_mean=running_mean, running_var=running_var)
    _check(x, running, weight, bias, dict(residual=residual))
    y, mean, rstd = like_map(x), torch.empty_like(bias), torch.empty_like(bias)
    channels_last = _is_channels_last(y)
    x = _in_format(x, channels_last)
    residual = x if residual is None else _in_format(residual, channels_last)
    weight, bias = weight.contiguous(), bias.contiguous()
    normalised = batch_statistics or bool(running)
    launch = _forward(_layout(x, weight), False, residual is not x, relu, not batch_statistics, normalised)
    if batch_statistics:
        partial = _partial_moments(x, channels_last, True)
        join = _batch_statistics(x.shape[1], partial.shape[0], bool(running))
        join(partial, mean, rstd, *(running.values() or (mean, rstd)), numbers=(momentum, eps))
        running = dict(mean=mean, rstd=rstd)
    launch(x, *(running.values() or (mean, rstd)), weight, bias, residual, y, mean, rstd, numbers=(eps,))
    return y, mean, rstd


def norm_backward(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    y: Tensor | None,
    batch_statistics: bool,
    needs_weight: bool,
    needs_residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    _check(x, dict(mean=mean, rstd=rstd), weight, None, dict(grad=grad, y=y))
    grad_x = like_map(x)
    channels_last = _is_channels_last(grad_x)
    x, grad, weight = _in_format(x, channels_last), _in_format(grad, channels_last), weight.contiguous()
    layout, relu = _layout(x, weight), y is not None
    output = x if y is None else _in_format(y, channels_last)
    masked = like_map(x) if relu and needs_residual else grad
    partial = _rows_of_sums(layout, False, weight)
    flags = BackwardFlags(
        True, needs_weight, batch_statistics, not batch_statistics, relu=relu, residual=masked is not grad
    )
    inputs = (grad, output, x, mean, rstd, weight)
    _backward(layout, False, flags, x.dtype)(*inputs, mean, rstd, grad_x, masked, partial)
    grad_weight, grad_bias, *through = _add_partials(partial, mean, rstd, weight, needs_weight)
    if batch_statistics:
        flags = BackwardFlags(grad_x=True, through_statistics=True, relu=relu)
        _backward(layout, False, flags, x.dtype)(*inputs, *through, grad_x, masked, partial)
    return grad_x, grad_weight, grad_bias, masked if needs_residual else None


def moments(x: Tensor, over_batch: bool) -> tuple[Tensor, Tensor]:
    _check(x, {}, None, None, {})
    channels_last = _is_channels_last(x)
    partial = _partial_moments(_in_format(x, channels_last), channels_last, over_batch)
    mean = partial.new_empty(x.shape[1:2] if over_batch else x.shape[:2])
    var = torch.empty_like(mean)
    _join_moments(1 if over_batch else x.shape[0], x.shape[1], partial.shape[0])(partial, mean, var)
    return mean, var


def moments_backward(grad_x: Tensor, x: Tensor, mean: Tensor, grad_mean: Tensor, grad_var: Tensor) -> None:
    _check(x, dict(mean=mean, grad_mean=grad_mean, grad_var=grad_var), None, None, dict(grad_x=grad_x))
    channels_last = _is_channels_last(grad_x)
    if not channels_last and not grad_x.is_contiguous():
        raise ValueError('bnet: grad_x must be contiguous, NCHW or channels_last')
    _add_moments(grad_x, grad_x, _in_format(x, channels_last), mean, grad_mean, grad_var)


def moments_backward_rounded(grad: Tensor, x: Tensor, mean: Tensor, grad_mean: Tensor, grad_var: Tensor) -> Tensor:
    _check(x, dict(mean=mean, grad_mean=grad_mean, grad_var=grad_var), None, None, dict(grad=grad), torch.float32)
    grad_x = like_map(x)
    channels_last = _is_channels_last(grad_x)
    x, grad = _in_format(x, channels_last), _in_format(grad, channels_last)
    _add_moments(grad, grad_x, x, mean, grad_mean, grad_var)
    return grad_x


def _rows_of_sums(layout: Layout, by_sample: bool, weight: Tensor) -> Tensor:
    """Room for what the programs of backward_kernel find: (rows, (k * k + 3) / 4, C, 4)."""
    plan = _plan_backward(layout, by_sample, True)
    return weight.new_empty(plan.groups * plan.strips, (weight.shape[-1] ** 2 + 3) // 4, weight.shape[0], 4)


def _add_partials(
    partial: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, needs_weight: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of weight, bias, mean and rstd."""
    found = torch.empty_like(weight), weight.new_empty(weight.shape[0]), torch.empty_like(mean), torch.empty_like(rstd)
    _joined_sums(partial.shape, mean.shape, needs_weight)(partial, rstd, *found)
    return found


def _partial_moments(x: Tensor, channels_last: bool, over_batch: bool) -> Tensor:
    """Rows of moments (rows, 3, C); those of a sample one after the other."""
    launch, rows = _moments(x.shape, channels_last, x.dtype, over_batch)
    partial = x.new_empty(rows, 3, x.shape[1], dtype=torch.float32)
    launch(x, partial)
    return partial


def _add_moments(grad: Tensor, grad_x: Tensor, x: Tensor, mean: Tensor, grad_mean: Tensor, grad_var: Tensor) -> None:
    launch = _moments_backward(x.shape, _is_channels_last(grad_x), x.dtype, grad.dtype, mean.dim() == 2)
    launch(grad, grad_x, x, mean.contiguous(), grad_mean.contiguous(), grad_var.contiguous())


# Each of these is planned once for each layout: shape, whether channels_last, dtype, size of the taps.
Layout = tuple[torch.Size, bool, torch.dtype, int]
planned = functools.lru_cache(maxsize=4096)


def _layout(x: Tensor, weight: Tensor) -> Layout:
    return x.shape, _is_channels_last(x), x.dtype, weight.shape[-1]


def _windows(layout: Layout, plan: WindowPlan, by_sample: bool) -> tuple[int, ...]:
    """The constants that forward_kernel and backward_kernel have in common."""
    (samples, channels, height, width), channels_last, _, k = layout
    sizes = (samples, channels, height, width // plan.tile.vector, channels if by_sample else 0)
    return (*sizes, *plan[1:-1], k, *plan.tile, channels_last)


@planned
def _forward(
    layout: Layout, by_sample: bool, residual: bool, relu: bool, variance: bool = False, normalised: bool = True
) -> Launch:
    shape, channels_last, _, k = layout
    plan = plan_windows(shape, k, channels_last, by_sample=False, sums=False)
    constants = (*_windows(layout, plan, by_sample), residual, relu, variance, normalised)
    return Launch(kernels.forward_kernel, plan.programs, constants, plan.tile.lanes)


@planned
def _plan_backward(layout: Layout, by_sample: bool, sums: bool) -> WindowPlan:
    shape, channels_last, _, k = layout
    return plan_windows(shape, k, channels_last, by_sample, sums)


@planned
def _backward(layout: Layout, by_sample: bool, flags: BackwardFlags, grad_x_dtype: torch.dtype) -> Launch:
    """``grad_x_dtype`` is part of what is compiled."""
    (samples, _, height, width), channels_last, _, k = layout
    plan = _plan_backward(layout, by_sample, flags.sums)
    constants = (float(samples * height * width), *_windows(layout, plan, by_sample), *flags)
    # Four programs on a multiprocessor, where so many registers are enough.
    registers = 128 if k < 7 and (channels_last or plan.tile.vector == COLUMNS) else None
    return Launch(kernels.backward_kernel, plan.programs, constants, plan.tile.lanes, registers)


@planned
def _joined_sums(rows: torch.Size, numbers: torch.Size, needs_weight: bool) -> Launch:
    groups, fourths, channels, _ = rows
    samples, step = (numbers[0], channels) if len(numbers) == 2 else (1, 0)
    block, depth = _block(channels * fourths, groups // samples)
    sizes = (samples, channels, groups // samples, step)
    constants = (*sizes, 4 * fourths - 3, needs_weight, block, depth)
    return Launch(kernels.add_partials_kernel, parts(channels * fourths, block), constants, block * depth)


def _block(channels: int, rows: int) -> tuple[int, int]:
    """Channels, and rows of sums for them, that a program of the joining kernels adds at a time."""
    depth = min(8, power_of_two(rows))
    return min(LANES // depth, power_of_two(channels)), depth


def _pixels(shape: torch.Size, channels_last: bool, plan: PixelPlan) -> tuple[int, ...]:
    """The constants that moments_kernel and moments_backward_kernel have in common."""
    samples, channels, height, width = shape
    if channels_last:
        vectors = (channels // plan.tile.vector, height * width)
    else:
        vectors = (channels, height * width // plan.tile.vector)
    return (samples, *vectors, *plan[1:-1], *plan.tile, channels_last)


@planned
def _moments(shape: torch.Size, channels_last: bool, dtype: torch.dtype, over_batch: bool) -> tuple[Launch, int]:
    """And the number of rows of moments that it writes."""
    plan = plan_pixels(shape, channels_last, by_sample=not over_batch)
    launch = Launch(kernels.moments_kernel, plan.programs, _pixels(shape, channels_last, plan), plan.tile.lanes)
    return launch, plan.groups * plan.strips


@planned
def _join_moments(samples: int, channels: int, rows: int) -> Launch:
    block, depth = _block(channels, rows // samples)
    constants = (channels, rows // samples, block, depth)
    return Launch(kernels.join_moments_kernel, samples * parts(channels, block), constants, block * depth)


@planned
def _batch_statistics(channels: int, groups: int, has_running: bool) -> Launch:
    block, depth = _block(channels, groups)
    constants = (channels, groups, has_running, block, depth)
    return Launch(kernels.batch_statistics_kernel, parts(channels, block), constants, block * depth)


@planned
def _moments_backward(
    shape: torch.Size, channels_last: bool, dtype: torch.dtype, grad_dtype: torch.dtype, by_sample: bool
) -> Launch:
    plan = plan_pixels(shape, channels_last, by_sample)
    samples, _, height, width = shape
    count = float(height * width * (1 if by_sample else samples))
    constants = (count, *_pixels(shape, channels_last, plan), by_sample)
    return Launch(kernels.moments_backward_kernel, plan.programs, constants, plan.tile.lanes)


_checked: set[tuple] = set()  # arguments that were right


def _check(
    x: Tensor,
    numbers: dict[str, Tensor],
    weight: Tensor | None,
    bias: Tensor | None,
    maps: dict[str, Tensor | None],
    maps_dtype: torch.dtype | None = None,
) -> None:
    """Each refusal names the argument, before any kernel runs."""
    given = (x, weight, bias, *numbers.values(), *maps.values())
    described = [None if t is None else (t.shape, t.dtype, t.get_device()) for t in given]
    key = (maps_dtype, *numbers, *maps, *described)
    if key in _checked:
        return
    if x.dim() != 4 or not x.numel():
        raise ValueError(f'bnet: x must be 4-D (N, C, H, W) and not empty, got shape {tuple(x.shape)}')
    if x.dtype not in TRITON_DTYPES:
        raise TypeError(f'bnet: x must be float32, float16 or bfloat16, got {x.dtype}')
    n, c = x.shape[:2]
    k = weight.shape[-1] if weight is not None and weight.dim() else 0
    if weight is not None and k not in KERNEL_SIZES:
        raise ValueError(f'bnet: weight must be ({c}, 1, k, k) with k 1, 3, 5 or 7, got {tuple(weight.shape)}')
    first = next(iter(numbers.values()), x)
    if numbers and tuple(first.shape) not in ((c,), (n, c)):
        raise ValueError(f'bnet: {next(iter(numbers))} must be ({c},) or ({n}, {c}), got {tuple(first.shape)}')
    expected = {name: (tuple(first.shape), torch.float32) for name in numbers}
    expected |= {name: (tuple(x.shape), maps_dtype or x.dtype) for name in maps}
    expected |= dict(weight=((c, 1, k, k), torch.float32), bias=((c,), torch.float32))
    tensors = dict(zip(('x', 'weight', 'bias', *numbers, *maps), given))
    for name, (shape, dtype) in expected.items():
        tensor = tensors[name]
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape or tensor.device != x.device:
            raise ValueError(
                f'bnet: {name} must be {shape} on {x.device}, got {tuple(tensor.shape)} on {tensor.device}'
            )
        if tensor.dtype != dtype:
            raise TypeError(f'bnet: {name} must be {dtype} for x of {x.dtype}, got {tensor.dtype}')
    if len(_checked) >= 4096:
        _checked.clear()
    _checked.add(key)


def _is_channels_last(x: Tensor) -> bool:
    return not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def _in_format(x: Tensor, channels_last: bool) -> Tensor:
    """Any other strides are copied."""
    return x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
