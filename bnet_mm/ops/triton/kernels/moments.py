"""The kernels without taps: moments of a map, and what they add to its gradient."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _lanes(channel_tile, OUTER: tl.constexpr, INNER: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """Channel and pixel of each lane."""
    lane = tl.arange(0, OUTER * INNER)
    if CHANNELS_LAST:
        channel = channel_tile * INNER + lane % INNER
        pixel = lane // INNER
    else:
        channel = channel_tile * OUTER + lane // INNER
        pixel = lane % INNER
    return channel, pixel


@triton.jit
def _steps(channels, height, width, CHANNELS_LAST: tl.constexpr):
    """Distances in memory of neighbouring samples, channels, rows and columns; 64 bits."""
    one = tl.full((), 1, tl.int64)
    if CHANNELS_LAST:
        steps = (one * height * width * channels, one, one * width * channels, one * channels)
    else:
        steps = (one * height * width * channels, one * height * width, one * width, 1)
    return steps


@triton.jit
def _sum_lanes(value, OUTER: tl.constexpr, INNER: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """One sum for each channel of a program."""
    return tl.sum(tl.reshape(value, (OUTER, INNER)), 0 if CHANNELS_LAST else 1)


@triton.jit
def _channels_of_sums(channel_tile, OUTER: tl.constexpr, INNER: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    if CHANNELS_LAST:
        channel = channel_tile * INNER + tl.arange(0, INNER)
    else:
        channel = channel_tile * OUTER + tl.arange(0, OUTER)
    return channel


@triton.jit
def _pixels(first, stop, tile, channels, pixels, lines, OUTER: tl.constexpr, INNER: tl.constexpr, DEPTH: tl.constexpr,
            CHANNELS_LAST: tl.constexpr):  # fmt: skip
    """Sample (DEPTH, 1), channel (1, lanes), place in memory and existence of the pixels of lines ``first ... stop``.

    A line is as many pixels of one sample as the lanes have; a sample has ``lines`` of them.
    """
    channel, pixel = _lanes(tile, OUTER, INNER, CHANNELS_LAST)
    step_n, step_c, _, step_p = _steps(channels, 1, pixels, CHANNELS_LAST)
    channel = channel[None, :]
    line = first + tl.arange(0, DEPTH)[:, None]
    sample = line // lines
    start = line % lines * (OUTER if CHANNELS_LAST else INNER)
    left = tl.where(line < stop, pixels - start, 0)
    place = (sample * step_n + start * step_p) + (channel * step_c + pixel[None, :] * step_p)
    return sample, channel, place, (pixel[None, :] < left) & (channel < channels)


@triton.jit(do_not_specialize=['tiles', 'lines', 'strips', 'strip_lines', 'group_lines'])
def moments_kernel(
    x, partial, channels, pixels, lines, tiles, strips, strip_lines, group_lines,
    OUTER: tl.constexpr, INNER: tl.constexpr, DEPTH: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """``partial``: (groups, strips, 3, C): number of pixels, mean, squares around it; all joined by Chan's formula."""
    program = tl.program_id(0)
    tile = program % tiles
    strip = program // tiles % strips
    group = program // tiles // strips
    count = tl.zeros((OUTER * INNER,), tl.float32)
    mean = tl.zeros((OUTER * INNER,), tl.float32)
    squares = tl.zeros((OUTER * INNER,), tl.float32)
    begin = group * group_lines + strip * strip_lines
    stop = tl.minimum(begin + strip_lines, (group + 1) * group_lines)
    for first in range(begin, stop, DEPTH):
        _, _, place, valid = _pixels(first, stop, tile, channels, pixels, lines, OUTER, INNER, DEPTH, CHANNELS_LAST)
        value = tl.load(x + place, mask=valid, other=0.0).to(tl.float32)
        number = tl.sum(valid.to(tl.float32), 0)
        average = tl.sum(value, 0) / tl.maximum(number, 1.0)
        d = tl.where(valid, value - average[None, :], 0.0)
        total = count + number
        share = number / tl.maximum(total, 1.0)
        delta = average - mean
        # An infinite mean stays, where adding the difference would make it NaN.
        mean = tl.where(tl.abs(mean) == float('inf'), mean + average, mean + delta * share)
        squares += tl.sum(d * d, 0) + delta * delta * (count * share)
        count = total
    number = _sum_lanes(count, OUTER, INNER, CHANNELS_LAST)
    terms = mean * count + 0.0  # a sum, and no product any more, for the sum over lanes; see the module
    average = _sum_lanes(terms, OUTER, INNER, CHANNELS_LAST) / tl.maximum(number, 1.0)
    d = tl.reshape(mean, (OUTER, INNER)) - (average[None, :] if CHANNELS_LAST else average[:, None])
    squares += count * tl.reshape(d * d, (OUTER * INNER,))
    out = _channels_of_sums(tile, OUTER, INNER, CHANNELS_LAST)
    row = partial + (group * strips + strip).to(tl.int64) * 3 * channels + out
    tl.store(row, number, mask=out < channels)
    tl.store(row + channels, average, mask=out < channels)
    tl.store(row + 2 * channels, _sum_lanes(squares, OUTER, INNER, CHANNELS_LAST), mask=out < channels)


@triton.jit
def _join(partial, n, channel, channels, groups, BLOCK: tl.constexpr, DEPTH: tl.constexpr):
    """Number of pixels, mean and variance of what the rows ``partial[n]`` of (samples, groups, 3, C) stand for."""
    here = channel < channels
    count = tl.zeros((DEPTH, BLOCK), tl.float64)
    total = tl.zeros((DEPTH, BLOCK), tl.float64)
    for first in range(0, groups, DEPTH):
        group = first + tl.arange(0, DEPTH)[:, None]
        at = partial + (n * groups + group) * 3 * channels + channel[None, :]
        valid = (group < groups) & here[None, :]
        number = tl.load(at, mask=valid, other=0.0).to(tl.float64)
        count += number
        total += number * tl.load(at + channels, mask=valid, other=0.0).to(tl.float64)
    pixels = tl.maximum(tl.sum(count, 0), 1.0)
    average = tl.sum(total, 0) / pixels
    squares = tl.zeros((DEPTH, BLOCK), tl.float64)
    for first in range(0, groups, DEPTH):
        group = first + tl.arange(0, DEPTH)[:, None]
        at = partial + (n * groups + group) * 3 * channels + channel[None, :]
        valid = (group < groups) & here[None, :]
        number = tl.load(at, mask=valid, other=0.0).to(tl.float64)
        d = tl.load(at + channels, mask=valid, other=0.0).to(tl.float64) - average[None, :]
        own = tl.load(at + 2 * channels, mask=valid, other=0.0).to(tl.float64)
        squares += tl.where(valid, own + number * d * d, 0.0)
    return pixels, average, tl.sum(squares, 0) / pixels


@triton.jit(do_not_specialize=['channels', 'groups'])
def join_moments_kernel(partial, mean, var, channels, groups, BLOCK: tl.constexpr, DEPTH: tl.constexpr):
    """Mean and variance of each sample."""
    blocks = tl.cdiv(channels, BLOCK)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    channel = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    _, average, variance = _join(partial, n, channel, channels, groups, BLOCK, DEPTH)
    tl.store(mean + n * channels + channel, average.to(tl.float32), mask=channel < channels)
    tl.store(var + n * channels + channel, variance.to(tl.float32), mask=channel < channels)


@triton.jit(do_not_specialize=['channels', 'groups'])
def batch_statistics_kernel(
    partial, mean, rstd, running_mean, running_var, momentum, eps, channels, groups,
    RUNNING: tl.constexpr, BLOCK: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Mean and inverse deviation of the batch; RUNNING: the running statistics move there (variance unbiased)."""
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = channel < channels
    zero = tl.full((), 0, tl.int64)
    pixels, average, variance = _join(partial, zero, channel, channels, groups, BLOCK, DEPTH)
    tl.store(mean + channel, average.to(tl.float32), mask=here)
    deviation = tl.sqrt_rn(variance.to(tl.float32) + eps)
    tl.store(rstd + channel, tl.div_rn(1.0, deviation), mask=here)
    if RUNNING:
        old = tl.load(running_mean + channel, mask=here, other=0.0)
        tl.store(running_mean + channel, momentum * average.to(tl.float32) + (1 - momentum) * old, mask=here)
        unbiased = (variance * (pixels / tl.maximum(pixels - 1.0, 1.0))).to(tl.float32)
        old = tl.load(running_var + channel, mask=here, other=0.0)
        tl.store(running_var + channel, momentum * unbiased + (1 - momentum) * old, mask=here)


@triton.jit(do_not_specialize=['tiles', 'lines', 'all_lines'])
def moments_backward_kernel(
    grad, grad_x, x, mean, grad_mean, grad_var, count, channels, pixels, lines, all_lines, tiles,
    OUTER: tl.constexpr, INNER: tl.constexpr, DEPTH: tl.constexpr, CHANNELS_LAST: tl.constexpr, BY_SAMPLE: tl.constexpr,
):  # fmt: skip
    """``grad`` may be ``grad_x``, or wider."""
    tile = tl.program_id(0) % tiles
    first = tl.program_id(0) // tiles * DEPTH
    sample, channel, place, valid = _pixels(first, all_lines, tile, channels, pixels, lines, OUTER, INNER, DEPTH,
                                            CHANNELS_LAST)  # fmt: skip
    at = channel
    here = channel < channels
    if BY_SAMPLE:
        at = sample * channels + channel
        here = valid
    centre = tl.load(mean + at, mask=here, other=0.0)
    shift = tl.load(grad_mean + at, mask=here, other=0.0) / count
    scale = tl.load(grad_var + at, mask=here, other=0.0) * (2 / count)
    d = tl.load(x + place, mask=valid, other=0.0).to(tl.float32) - centre
    out = tl.load(grad + place, mask=valid, other=0.0).to(tl.float32) + (shift + scale * d)
    tl.store(grad_x + place, out.to(grad_x.dtype.element_ty), mask=valid)
