"""The kernels of the operators of schemas.py for CUDA, in Triton.

Paper: Xu et al., arXiv 2011.14150, Algorithm 1. With ``d = x - mean``, x^ = rstd * d, taps w_j, g = dL/dy:

    y_i   = rstd * sum_j w_j d_(i+j) + bias          d is 0 off the map: zeros are padded in normalised space
    g^_i  = sum_j w_j g_(i-j)                        grad_x = rstd * g^
    gw_j  = rstd * sum_i g_i d_(i+j) = rstd * sum_i d_i g_(i-j)
    dL/dmean = -rstd * sum g^,  dL/drstd = sum g^ d

Both sums of the backward pass need g at the taps' places and d only at its own. So where the map itself is NaN or Inf
beside the border, more taps' gradients become NaN than by the first form (d times a padded zero of g).

Memory traffic, in maps: forward reads x (and the residual) and writes y; backward reads x and g and writes grad_x;
moments reads x; moments_backward reads grad and x and writes grad_x. What a tap needs of its neighbours comes from
L1 and L2, and as seldom as registers allow: each lane computes ``rows x columns`` neighbouring outputs, so one loaded
value serves min(rows, k) * min(columns, k) taps. Lanes (threads) lie along the memory: NCHW has ``inner`` columns of
``outer`` channels, channels_last ``inner`` channels of ``outer`` groups of columns. Equal bits on every run: sums are
kept per lane in float32, joined per program, written as one row per program, and added in float64 in a fixed order by a
second kernel, without atomics; and no product is a term of a sum over lanes, as where the compiler contracts it (fma),
the lanes that store one sum to one place have different last bits of it, and the hardware chooses.
"""

from __future__ import annotations

import triton
import triton.language as tl

# K: size of the taps; ROWS x COLUMNS: outputs of one lane; OUTER x INNER: lanes of one program.


@triton.jit
def _lanes(channel_tile, column_tile, OUTER: tl.constexpr, INNER: tl.constexpr, COLUMNS: tl.constexpr,
           CHANNELS_LAST: tl.constexpr):  # fmt: skip
    """Channel and first column of each lane."""
    lane = tl.arange(0, OUTER * INNER)
    if CHANNELS_LAST:
        channel = channel_tile * INNER + lane % INNER
        column = (column_tile * OUTER + lane // INNER) * COLUMNS
    else:
        channel = channel_tile * OUTER + lane // INNER
        column = (column_tile * INNER + lane % INNER) * COLUMNS
    return channel, column


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
def _zeros(LANES: tl.constexpr, COUNT: tl.constexpr):
    values = ()
    for _ in tl.static_range(COUNT):
        values = values + (tl.zeros((LANES,), tl.float32),)
    return values


@triton.jit
def _load_taps(weight, channel, here, step_channel, step_tap, COUNT: tl.constexpr):
    taps = ()
    for t in tl.static_range(COUNT):
        taps = taps + (tl.load(weight + channel * step_channel + t * step_tap, mask=here, other=0.0),)
    return taps


@triton.jit
def _columns(here, column, SPAN: tl.constexpr, MARGIN: tl.constexpr):
    """Columns ``column - MARGIN ...`` of each lane; unsigned, so that one comparison with the width tells all."""
    columns = ()
    for s in tl.static_range(SPAN):
        columns = columns + (tl.where(here, column + (s - MARGIN), -1).to(tl.uint32),)
    return columns


@triton.jit
def _width_of_row(row, height, width):
    """The width of the map, 0 for a row off it."""
    return tl.where(tl.cast(row, tl.uint32) < height.to(tl.uint32), width, 0)


@triton.jit
def _centres(mean, columns, width, SPAN: tl.constexpr):
    """What is subtracted in each column: the mean, but 0 from the zeros that are read off the map."""
    centres = ()
    for s in tl.static_range(SPAN):
        centres = centres + (tl.where(columns[s] < width, mean, 0.0),)
    return centres


@triton.jit
def _load_row(line, width, step, columns, centres, SPAN: tl.constexpr, MARGIN: tl.constexpr, CENTRED: tl.constexpr):
    """SPAN neighbouring values of a row, from MARGIN left of ``line``, less the mean if CENTRED; 0 off the map.

    ``width`` is 0 for a row off the map. There is no selection after a load, as a predicate would be kept for it.
    """
    weight = tl.where(width > 0, 1.0, 0.0)
    values = ()
    for s in tl.static_range(SPAN):
        value = tl.load(line + (s - MARGIN) * step, mask=columns[s] < width, other=0.0).to(tl.float32)
        if CENTRED:
            value = value - centres[s] * weight
        values = values + (value,)
    return values


@triton.jit
def _correlate(sums, taps, values, r: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
               FLIPPED: tl.constexpr):  # fmt: skip
    """The outputs of a lane, plus what row r of the ROWS + K - 1 rows around them gives."""
    new = ()
    for o in tl.static_range(ROWS):
        for e in tl.static_range(COLUMNS):
            total = sums[o * COLUMNS + e]
            if r >= o and r < o + K:
                for j in tl.static_range(K):
                    if FLIPPED:
                        total += taps[K * K - 1 - (r - o) * K - j] * values[e + j]
                    else:
                        total += taps[(r - o) * K + j] * values[e + j]
            new = new + (total,)
    return new


@triton.jit
def _correlate_taps(sums, centre, values, r: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The K * K sums of ``centre`` times gradient, plus what row r of the gradient gives."""
    new = ()
    for i in tl.static_range(K):
        for j in tl.static_range(K):
            total = sums[i * K + j]
            if i + r >= K - 1 and i + r < K - 1 + ROWS:
                for e in tl.static_range(COLUMNS):
                    total += centre[(i + r - (K - 1)) * COLUMNS + e] * values[e + K - 1 - j]
            new = new + (total,)
    return new


@triton.jit
def _add_row(sums, values, o: tl.constexpr, weight, COLUMNS: tl.constexpr):
    new = ()
    for e in tl.static_range(COLUMNS):
        new = new + (sums[e] + values[o * COLUMNS + e] * weight,)
    return new


INTEGERS = [
    'samples', 'channels', 'height', 'width', 'sample_step', 'column_tiles', 'tiles', 'strips', 'rows_each',
    'samples_each', 'step_channel', 'step_tap', 'groups',
]  # fmt: skip


@triton.jit(do_not_specialize=INTEGERS)
def forward_kernel(
    x, mean, rstd, weight, bias, residual, y,
    samples, channels, height, width, sample_step, step_channel, step_tap,
    column_tiles, tiles, strips, rows_each, samples_each,
    K: tl.constexpr, OUTER: tl.constexpr, INNER: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, RESIDUAL: tl.constexpr, RELU: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    tile = program % tiles
    strip = program // tiles % strips
    group = program // tiles // strips
    channel, column = _lanes(tile // column_tiles, tile % column_tiles, OUTER, INNER, COLUMNS, CHANNELS_LAST)
    step_n, step_c, step_h, step_w = _steps(channels, height, width, CHANNELS_LAST)
    here = channel < channels
    columns = _columns(here, column, COLUMNS + K - 1, K // 2)
    width = width.to(tl.uint32)
    taps = _load_taps(weight, channel, here, step_channel, step_tap, K * K)
    start = tl.load(bias + channel, mask=here, other=0.0)
    place = channel * step_c + column * step_w
    for n in range(group * samples_each, tl.minimum((group + 1) * samples_each, samples)):
        centre = tl.load(mean + n * sample_step + channel, mask=here, other=0.0)
        scale = tl.load(rstd + n * sample_step + channel, mask=here, other=0.0)
        centres = _centres(centre, columns, width, COLUMNS + K - 1)
        for first in range(strip * rows_each, tl.minimum((strip + 1) * rows_each, height), ROWS):
            at = n * step_n + place + first * step_h
            line = x + (at - K // 2 * step_h)
            sums = _zeros(OUTER * INNER, ROWS * COLUMNS)
            for r in tl.static_range(ROWS + K - 1):
                limit = _width_of_row(first + (r - K // 2), height, width)
                values = _load_row(line, limit, step_w, columns, centres, COLUMNS + K - 1, K // 2, True)
                sums = _correlate(sums, taps, values, r, K, ROWS, COLUMNS, False)
                line += step_h
            for o in tl.static_range(ROWS):
                limit = _width_of_row(first + o, height, width)
                for e in tl.static_range(COLUMNS):
                    valid = columns[e + K // 2] < limit
                    out = sums[o * COLUMNS + e] * scale + start
                    if RESIDUAL:
                        out += tl.load(residual + at + e * step_w, mask=valid, other=0.0).to(tl.float32)
                    if RELU:
                        out = tl.where(out < 0, 0.0, out)  # NaN stays
                    tl.store(y + at + e * step_w, out.to(y.dtype.element_ty), mask=valid)
                at += step_h


@triton.jit(do_not_specialize=INTEGERS)
def backward_kernel(
    grad, x, mean, rstd, weight, grad_x, partial,
    samples, channels, height, width, sample_step, step_channel, step_tap,
    column_tiles, tiles, strips, rows_each, samples_each,
    K: tl.constexpr, OUTER: tl.constexpr, INNER: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, WEIGHT: tl.constexpr, STATISTICS: tl.constexpr,
):  # fmt: skip
    """``partial``: (groups, strips, column tiles, K * K + 3, C): sums for the taps, the bias, mean and rstd."""
    program = tl.program_id(0)
    tile = program % tiles
    strip = program // tiles % strips
    group = program // tiles // strips
    channel, column = _lanes(tile // column_tiles, tile % column_tiles, OUTER, INNER, COLUMNS, CHANNELS_LAST)
    step_n, step_c, step_h, step_w = _steps(channels, height, width, CHANNELS_LAST)
    here = channel < channels
    columns = _columns(here, column, COLUMNS + K - 1, K // 2)
    width = width.to(tl.uint32)
    own = _columns(here, column, COLUMNS, 0)
    taps = _load_taps(weight, channel, here, step_channel, step_tap, K * K)
    place = channel * step_c + column * step_w
    tap_sums = _zeros(OUTER * INNER, K * K if WEIGHT else 1)
    bias_sum = tl.zeros((OUTER * INNER,), tl.float32)
    mean_sums = _zeros(OUTER * INNER, COLUMNS)
    rstd_sum = tl.zeros((OUTER * INNER,), tl.float32)
    first_sample = group * samples_each
    for n in range(first_sample, tl.minimum(first_sample + samples_each, samples)):
        centre = tl.load(mean + n * sample_step + channel, mask=here, other=0.0)
        scale = tl.load(rstd + n * sample_step + channel, mask=here, other=0.0)
        centres = _centres(centre, own, width, COLUMNS)
        for first in range(strip * rows_each, tl.minimum((strip + 1) * rows_each, height), ROWS):
            at = n * step_n + place + first * step_h
            d = ()
            if WEIGHT or STATISTICS:
                line = x + at
                for o in tl.static_range(ROWS):
                    limit = _width_of_row(first + o, height, width)
                    d = d + _load_row(line, limit, step_w, own, centres, COLUMNS, 0, True)
                    line += step_h
            line = grad + (at - K // 2 * step_h)
            sums = _zeros(OUTER * INNER, ROWS * COLUMNS)
            for r in tl.static_range(ROWS + K - 1):
                limit = _width_of_row(first + (r - K // 2), height, width)
                values = _load_row(line, limit, step_w, columns, centres, COLUMNS + K - 1, K // 2, False)
                sums = _correlate(sums, taps, values, r, K, ROWS, COLUMNS, True)
                if WEIGHT:
                    tap_sums = _correlate_taps(tap_sums, d, values, r, K, ROWS, COLUMNS)
                if r >= K // 2 and r < ROWS + K // 2:
                    for e in tl.static_range(COLUMNS):
                        bias_sum += values[e + K // 2]
                line += step_h
            for o in tl.static_range(ROWS):
                limit = _width_of_row(first + o, height, width)
                if STATISTICS:
                    mean_sums = _add_row(mean_sums, sums, o, tl.where(limit > 0, 1.0, 0.0), COLUMNS)
                for e in tl.static_range(COLUMNS):
                    if STATISTICS:
                        rstd_sum += sums[o * COLUMNS + e] * d[o * COLUMNS + e]
                    out = (sums[o * COLUMNS + e] * scale).to(grad_x.dtype.element_ty)
                    tl.store(grad_x + at + e * step_w, out, mask=own[e] < limit)
                at += step_h
    mean_sum = tl.zeros((OUTER * INNER,), tl.float32)
    for e in tl.static_range(COLUMNS):
        mean_sum += tl.where(own[e] < width, mean_sums[e], 0.0)
    out = _channels_of_sums(tile // column_tiles, OUTER, INNER, CHANNELS_LAST)
    # Of one sample where rstd depends on the sample. It multiplies sums, not their terms; see the module.
    scale = tl.load(rstd + first_sample * sample_step + out, mask=out < channels, other=0.0)
    line = ((group * strips + strip) * column_tiles + tile % column_tiles).to(tl.int64) * (K * K + 3)
    if WEIGHT:
        for t in tl.static_range(K * K):
            total = _sum_lanes(tap_sums[t], OUTER, INNER, CHANNELS_LAST) * scale
            tl.store(partial + (line + t) * channels + out, total, mask=out < channels)
    total = _sum_lanes(bias_sum, OUTER, INNER, CHANNELS_LAST)
    tl.store(partial + (line + K * K) * channels + out, total, mask=out < channels)
    if STATISTICS:
        total = _sum_lanes(mean_sum, OUTER, INNER, CHANNELS_LAST) * -scale
        tl.store(partial + (line + K * K + 1) * channels + out, total, mask=out < channels)
        total = _sum_lanes(rstd_sum, OUTER, INNER, CHANNELS_LAST)
        tl.store(partial + (line + K * K + 2) * channels + out, total, mask=out < channels)


@triton.jit(do_not_specialize=INTEGERS)
def add_partials_kernel(
    partial, grad_weight, grad_bias, grad_mean, grad_rstd, samples, channels, groups,
    TAPS: tl.constexpr, WEIGHT: tl.constexpr, STATISTICS: tl.constexpr, BLOCK: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Sums of ``partial`` (samples, groups, TAPS + 3, C) over groups, of taps and bias also over samples; or zeros."""
    t = tl.program_id(0)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = channel < channels
    wanted = t == TAPS
    if WEIGHT:
        wanted = wanted | (t < TAPS)
    if STATISTICS:
        wanted = wanted | (t > TAPS)
    total = tl.zeros((BLOCK,), tl.float64)
    for n in range(samples):
        sums = tl.zeros((DEPTH, BLOCK), tl.float64)
        for first in range(0, groups, DEPTH):
            group = first + tl.arange(0, DEPTH)[:, None]
            line = (group + n * groups).to(tl.int64) * (TAPS + 3) + t
            valid = (group < groups) & here[None, :] & wanted
            sums += tl.load(partial + line * channels + channel[None, :], mask=valid, other=0.0).to(tl.float64)
        own = tl.sum(sums, 0)
        if t == TAPS + 1:
            tl.store(grad_mean + n * channels + channel, own.to(tl.float32), mask=here)
        if t == TAPS + 2:
            tl.store(grad_rstd + n * channels + channel, own.to(tl.float32), mask=here)
        total += own
    if t < TAPS:
        tl.store(grad_weight + channel * TAPS + t, total.to(tl.float32), mask=here)
    if t == TAPS:
        tl.store(grad_bias + channel, total.to(tl.float32), mask=here)


@triton.jit
def _pixels(first, stop, tile, channels, pixels, lines, OUTER: tl.constexpr, INNER: tl.constexpr, DEPTH: tl.constexpr,
            CHANNELS_LAST: tl.constexpr):  # fmt: skip
    """Sample (DEPTH, 1), channel (1, lanes), place in memory and existence of the pixels of lines ``first ... stop``.

    A line is as many pixels of one sample as the lanes have; a sample has ``lines`` of them.
    """
    channel, pixel = _lanes(tile, 0, OUTER, INNER, 1, CHANNELS_LAST)
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


@triton.jit(do_not_specialize=INTEGERS)
def join_moments_kernel(partial, mean, var, channels, groups, BLOCK: tl.constexpr, DEPTH: tl.constexpr):
    """Mean and variance of what the rows of ``partial`` (samples, groups, 3, C) stand for, for each sample."""
    n = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
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
    tl.store(mean + n * channels + channel, average.to(tl.float32), mask=here)
    tl.store(var + n * channels + channel, (tl.sum(squares, 0) / pixels).to(tl.float32), mask=here)


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
