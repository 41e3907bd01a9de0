"""The kernels without taps: moments of a map, and what they add to its gradient.

A program reads tiles of OUTER x INNER values, INNER along the memory: NCHW has INNER pixels of OUTER channels,
channels_last INNER channels of OUTER pixels. It goes over a strip of pixels, tile by tile, of a group of samples.
"""

from __future__ import annotations

import triton
import triton.language as tl

NUMBERS = ['samples', 'channel_vectors', 'vectors', 'tiles', 'strips', 'strip_vectors', 'samples_each']


@triton.jit
def _places(channels, pixels, OUTER: tl.constexpr, INNER: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """Channel in a tile and pixel in a step, (OUTER, 1) and (1, INNER) or the reverse; distances in memory."""
    one = tl.full((), 1, tl.int64)  # as in lanes.py
    outer, inner = tl.arange(0, OUTER)[:, None], tl.arange(0, INNER)[None, :]
    if CHANNELS_LAST:
        found = (inner, outer, one, one * channels)
    else:
        found = (outer, inner, one * pixels, one)
    return found


@triton.jit(do_not_specialize=NUMBERS)
def moments_kernel(
    x, partial, samples, channel_vectors, vectors, tiles, strips, strip_vectors, samples_each,
    OUTER: tl.constexpr, INNER: tl.constexpr, VECTOR: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """``partial``: (groups, strips, 3, C): number of pixels, mean, squares around it.

    A lane adds up what its values differ from the first of them, and the squares of that: no division for each, and no
    loss where the mean is far from 0. Off the map it reads its first value, which adds nothing.
    """
    STEP: tl.constexpr = OUTER if CHANNELS_LAST else INNER
    TILE: tl.constexpr = INNER if CHANNELS_LAST else OUTER
    channels = channel_vectors * VECTOR if CHANNELS_LAST else channel_vectors
    pixels = vectors if CHANNELS_LAST else vectors * VECTOR
    program = tl.program_id(0)
    tile = program % tiles
    strip = program // tiles % strips
    group = program // tiles // strips
    channel, pixel, step_c, step_p = _places(channels, pixels, OUTER, INNER, CHANNELS_LAST)
    channel += tile * TILE
    begin = strip * strip_vectors
    stop = tl.minimum(begin + strip_vectors, vectors)
    if not CHANNELS_LAST:
        begin *= VECTOR
        stop *= VECTOR
    place = x + (channel * step_c + (begin + pixel) * step_p)
    step_n = step_p * step_c * (pixels if CHANNELS_LAST else channels)
    first_sample = group * samples_each
    last_sample = tl.minimum(first_sample + samples_each, samples)
    valid = (channel < channels) & (begin + pixel < stop)
    first = tl.load(place + first_sample * step_n, mask=valid, other=0.0)
    shift = first.to(tl.float32)
    shift = tl.where(shift - shift == 0.0, shift, 0.0)  # not NaN or Inf
    first = shift.to(x.dtype.element_ty)
    total = tl.zeros((OUTER, INNER), tl.float32)
    squares = tl.zeros((OUTER, INNER), tl.float32)
    for n in range(first_sample, last_sample):
        at = place + n * step_n
        for start in tl.range(begin, stop, STEP, loop_unroll_factor=4):
            valid = (channel < channels) & (start + pixel < stop)
            d = tl.load(at, mask=valid, other=first).to(tl.float32) - shift
            total += d
            squares = tl.fma(d, d, squares)
            at += STEP * step_p
    steps = tl.maximum(tl.cdiv(stop - begin - pixel, STEP), 0)
    count = (steps * (last_sample - first_sample)).to(tl.float32)
    difference = total / tl.maximum(count, 1.0)
    squares -= total * difference
    AXIS: tl.constexpr = 0 if CHANNELS_LAST else 1
    number = ((stop - begin) * (last_sample - first_sample)).to(tl.float32)
    mean = shift + difference
    terms = mean * count + 0.0  # a sum, and no product any more, for the sum over lanes; see the package
    average = tl.sum(terms, AXIS) / number
    d = mean - tl.expand_dims(average, AXIS)
    squares = tl.fma(count * d, d, squares)
    out = tile * TILE + tl.arange(0, TILE)
    row = partial + (group * strips + strip).to(tl.int64) * 3 * channels + out
    tl.store(row, tl.zeros((TILE,), tl.float32) + number, mask=out < channels)
    tl.store(row + channels, average, mask=out < channels)
    tl.store(row + 2 * channels, tl.sum(squares, AXIS), mask=out < channels)


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


@triton.jit(do_not_specialize=NUMBERS)
def moments_backward_kernel(
    grad, grad_x, x, mean, grad_mean, grad_var, count,
    samples, channel_vectors, vectors, tiles, strips, strip_vectors, samples_each,
    OUTER: tl.constexpr, INNER: tl.constexpr, VECTOR: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BY_SAMPLE: tl.constexpr,
):  # fmt: skip
    """``grad`` may be ``grad_x``, or wider."""
    STEP: tl.constexpr = OUTER if CHANNELS_LAST else INNER
    TILE: tl.constexpr = INNER if CHANNELS_LAST else OUTER
    channels = channel_vectors * VECTOR if CHANNELS_LAST else channel_vectors
    pixels = vectors if CHANNELS_LAST else vectors * VECTOR
    program = tl.program_id(0)
    strip = program // tiles % strips
    group = program // tiles // strips
    channel, pixel, step_c, step_p = _places(channels, pixels, OUTER, INNER, CHANNELS_LAST)
    channel += program % tiles * TILE
    begin = strip * strip_vectors
    stop = tl.minimum(begin + strip_vectors, vectors)
    if not CHANNELS_LAST:
        begin *= VECTOR
        stop *= VECTOR
    place = channel * step_c + (begin + pixel) * step_p
    step_n = step_p * step_c * (pixels if CHANNELS_LAST else channels)
    here = channel < channels
    first_sample = group * samples_each
    number = first_sample * channels + channel if BY_SAMPLE else channel  # with BY_SAMPLE a program has one sample
    centre = tl.load(mean + number, mask=here, other=0.0)
    shift = tl.load(grad_mean + number, mask=here, other=0.0) / count
    scale = tl.load(grad_var + number, mask=here, other=0.0) * (2 / count)
    for n in range(first_sample, tl.minimum(first_sample + samples_each, samples)):
        at = place + n * step_n
        for start in tl.range(begin, stop, STEP, loop_unroll_factor=4):
            valid = here & (start + pixel < stop)
            d = tl.load(x + at, mask=valid, other=0.0).to(tl.float32) - centre
            out = tl.load(grad + at, mask=valid, other=0.0).to(tl.float32) + (shift + scale * d)
            tl.store(grad_x + at, out.to(grad_x.dtype.element_ty), mask=valid)
            at += STEP * step_p
