"""The backward kernel."""

from __future__ import annotations

import triton
import triton.language as tl

from bnet_mm.ops.triton.kernels.lanes import (
    COLUMNS,
    NUMBERS,
    block_columns,
    correlate,
    correlate_taps,
    join,
    lane_channels,
    lane_columns,
    load_row,
    load_taps,
    row_masks,
    row_values,
    rows_from,
    steps,
    sum_columns,
    sum_lanes,
    zeros,
)


@triton.jit
def _load_centred(line, mean, masks, inside, step_w, LANES: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """COLUMNS values of x less the mean; 0 off the map, and everywhere unless ``inside``."""
    parts = ()
    centres = ()
    for p in tl.static_range(len(masks)):
        at = line + p * step_w if CHANNELS_LAST else block_columns(line, 0, COLUMNS)
        mask = masks[p] & inside
        parts = parts + (tl.load(at, mask=mask, other=0.0),)
        centres = centres + (tl.where(mask, mean if CHANNELS_LAST else mean[:, None], 0.0),)
    return row_values(parts, centres, LANES, 0, CHANNELS_LAST, True)


@triton.jit
def _store_row(values, grad_x, masks, step_w, LANES: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    if CHANNELS_LAST:
        for e in tl.static_range(COLUMNS):
            tl.store(grad_x + e * step_w, values[e].to(grad_x.dtype.element_ty), mask=masks[e])
    else:
        tl.store(block_columns(grad_x, 0, COLUMNS), join(values, LANES).to(grad_x.dtype.element_ty), mask=masks[0])


@triton.jit
def _gradient(line, y_line, masks, step_w, LANES: tl.constexpr, REACH: tl.constexpr, VECTOR: tl.constexpr,
              CHANNELS_LAST: tl.constexpr, RELU: tl.constexpr):  # fmt: skip
    """A row of the gradient, 0 where ReLU has made a 0 of a number; NaN lets it pass, as in torch."""
    parts = load_row(line, masks, step_w, REACH, VECTOR, CHANNELS_LAST)
    if RELU:
        outputs = load_row(y_line, masks, step_w, REACH, VECTOR, CHANNELS_LAST)
        masked = ()
        for p in tl.static_range(len(parts)):
            masked = masked + (tl.where(outputs[p].to(tl.float32) <= 0, 0.0, parts[p]),)
        parts = masked
    return parts


@triton.jit
def _add_row(sums, d, left, mean_sum, rstd_sum, VECTOR: tl.constexpr):
    """The sums of the statistics' gradients, plus what the first row of ``sums`` gives."""
    for e in tl.static_range(COLUMNS):
        rstd_sum = tl.fma(sums[e], d[e], rstd_sum)  # in no variant of the kernel by two roundings
    return mean_sum + sum_columns(sums, left, 0, VECTOR), rstd_sum


@triton.jit
def _grad_x(sums, d, scale, shift, slope, THROUGH: tl.constexpr):
    values = ()
    for e in tl.static_range(COLUMNS):
        if THROUGH:
            values = values + (sums[e] * scale + (shift + slope * d[e]),)
        else:
            values = values + (sums[e] * scale,)
    return values


@triton.jit(do_not_specialize=NUMBERS)
def backward_kernel(
    grad, y, x, mean, rstd, weight, grad_mean, grad_rstd, grad_x, grad_residual, partial, count,
    samples, channels, height, vectors, sample_step, tiles, column_tiles, strips, rows_each, items_each,
    K: tl.constexpr, OUTER: tl.constexpr, INNER: tl.constexpr, VECTOR: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, SUMS: tl.constexpr, WEIGHT: tl.constexpr, STATISTICS: tl.constexpr,
    GRAD_X: tl.constexpr, THROUGH_STATISTICS: tl.constexpr, RELU: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    """What of the backward pass is wanted.

    SUMS: ``partial``, (groups, strips, (K * K + 3) / 4, C, 4): sums for the taps if WEIGHT, the bias, and if STATISTICS
        mean and rstd, not yet times rstd.
    GRAD_X: the gradient of x; THROUGH_STATISTICS: also through those of the batch, of ``count`` pixels.
    RELU: that has made ``y``, and masks ``grad``; RESIDUAL: the masked gradient.
    """
    LANES: tl.constexpr = OUTER * INNER
    REACH: tl.constexpr = K // 2
    # Of x as many rows as the taps' sums need are held, down to REACH below the gradient's; else that of the outputs.
    ROWS: tl.constexpr = K if WEIGHT else 1
    BELOW: tl.constexpr = ROWS - 1 - REACH
    X: tl.constexpr = WEIGHT or STATISTICS or THROUGH_STATISTICS
    # Whether the next row is under way while this one is used: there are registers for it, and little arithmetic.
    AHEAD: tl.constexpr = K < 5
    program = tl.program_id(0)
    strip = program // tiles % strips
    group = program // tiles // strips
    width = vectors * VECTOR
    step_n, step_c, step_h, step_w = steps(channels, height, width, CHANNELS_LAST)
    channel = lane_channels(program % tiles, OUTER, INNER, CHANNELS_LAST)
    here = channel < channels
    channel = tl.minimum(channel, channels - 1)
    taps = load_taps(weight, channel, K * K)
    begin = strip * rows_each
    end = tl.minimum(begin + rows_each, height)
    first = tl.maximum(begin - REACH, 0)
    last = tl.minimum(end + REACH, height)
    tap_sums = zeros(LANES, K * K if WEIGHT else 0)
    bias_sum = tl.zeros((LANES,), tl.float32)
    mean_sum = tl.zeros((LANES,), tl.float32)
    rstd_sum = tl.zeros((LANES,), tl.float32)
    for item in range(group * items_each, tl.minimum((group + 1) * items_each, samples * column_tiles)):
        n = item // column_tiles
        column = lane_columns(item % column_tiles, OUTER, INNER, CHANNELS_LAST)
        own = row_masks(column, width, 0, VECTOR, CHANNELS_LAST)
        stored = row_masks(tl.where(here, column, width), width, 0, VECTOR, CHANNELS_LAST)
        left = width - column  # columns of the map from a lane's first on
        column = tl.minimum(column, (width - 1) // COLUMNS * COLUMNS)
        around = row_masks(column, width, REACH, VECTOR, CHANNELS_LAST)
        centre = tl.load(mean + n * sample_step + channel)
        scale = tl.load(rstd + n * sample_step + channel)
        shift = 0.0
        slope = 0.0
        if THROUGH_STATISTICS:
            shift = tl.load(grad_mean + channel) / count
            slope = tl.load(grad_rstd + channel) * (scale * scale * scale) / -count
        sums = zeros(LANES, (K - 1) * COLUMNS)
        place = n * step_n + channel * step_c + column * step_w
        line = grad + (place + first * step_h)
        y_line = y + (place + first * step_h)
        grad_x_line = grad_x + (place + begin * step_h)
        residual_line = grad_residual + (place + begin * step_h)
        x_line = x + (place + tl.maximum(begin, first + BELOW) * step_h)
        rows = zeros(LANES, COLUMNS)
        for r in tl.static_range(1, ROWS):
            if r <= REACH:
                rows = rows + zeros(LANES, COLUMNS)
            else:
                row = first + (r - 1 - REACH)
                rows = rows + _load_centred(x + (place + row * step_h), centre, own, (row >= begin) & (row < end),
                                            step_w, LANES, CHANNELS_LAST)  # fmt: skip
        parts = _gradient(line, y_line, around, step_w, LANES, REACH, VECTOR, CHANNELS_LAST, RELU)
        values = row_values(parts, parts, LANES, REACH, CHANNELS_LAST, False)
        for row in range(first, last):
            if not AHEAD:
                parts = _gradient(line, y_line, around, step_w, LANES, REACH, VECTOR, CHANNELS_LAST, RELU)
                values = row_values(parts, parts, LANES, REACH, CHANNELS_LAST, False)
            step = tl.where(row + 1 < last, step_h, 0)  # after the last row it is that again
            line += step
            y_line += step
            if AHEAD:
                parts = _gradient(line, y_line, around, step_w, LANES, REACH, VECTOR, CHANNELS_LAST, RELU)
            if X:
                inside = (row + BELOW >= begin) & (row + BELOW < end)
                rows = rows_from(rows, 1, ROWS - 1) + _load_centred(
                    x_line, centre, own, inside, step_w, LANES, CHANNELS_LAST
                )
                x_line += tl.where(inside, step_h, 0)
            outputs = correlate(sums, taps, values, K, True)
            if WEIGHT:
                tap_sums = correlate_taps(tap_sums, rows, values, K)
            if (row >= begin) & (row < end):
                if SUMS:
                    bias_sum += sum_columns(values, left, REACH, VECTOR)
                if RESIDUAL:
                    middle = ()
                    for e in tl.static_range(COLUMNS):
                        middle = middle + (values[REACH + e],)
                    _store_row(middle, residual_line, stored, step_w, LANES, CHANNELS_LAST)
                    residual_line += step_h
            if row >= begin + REACH:
                if STATISTICS:
                    mean_sum, rstd_sum = _add_row(outputs, rows, left, mean_sum, rstd_sum, VECTOR)
                if GRAD_X:
                    out = _grad_x(outputs, rows, scale, shift, slope, THROUGH_STATISTICS)
                    _store_row(out, grad_x_line, stored, step_w, LANES, CHANNELS_LAST)
                    grad_x_line += step_h
            sums = rows_from(outputs, 1, K - 1)
            if AHEAD:
                values = row_values(parts, parts, LANES, REACH, CHANNELS_LAST, False)
        # The last rows get nothing from below the map. (Those from REACH on are none; LLVM does better with all sums.)
        for o in tl.static_range(K - 1):
            row = last - REACH + o
            inside = (row >= begin) & (row < end)
            if WEIGHT:
                rows = rows_from(rows, 1, K - 1) + zeros(LANES, COLUMNS)
            elif X:
                rows = _load_centred(x_line, centre, own, inside, step_w, LANES, CHANNELS_LAST)
                x_line += tl.where(inside, step_h, 0)
            if inside:
                if STATISTICS:
                    mean_sum, rstd_sum = _add_row(rows_from(sums, o, 1), rows, left, mean_sum, rstd_sum, VECTOR)
                if GRAD_X:
                    out = _grad_x(rows_from(sums, o, 1), rows, scale, shift, slope, THROUGH_STATISTICS)
                    _store_row(out, grad_x_line, stored, step_w, LANES, CHANNELS_LAST)
                    grad_x_line += step_h
    if SUMS:
        CHANNELS: tl.constexpr = INNER if CHANNELS_LAST else OUTER
        all_sums = (tap_sums if WEIGHT else zeros(LANES, K * K)) + (bias_sum, mean_sum, rstd_sum)
        out = program % tiles * CHANNELS + tl.arange(0, CHANNELS)[:, None]
        row = (group * strips + strip).to(tl.int64) * channels * (K * K + 3)
        at = partial + row + out * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        for t in tl.static_range(0 if WEIGHT else K * K - 1, K * K + 3, COLUMNS):
            total = sum_lanes(rows_from(all_sums, t // COLUMNS, 1), OUTER, INNER, CHANNELS_LAST)
            tl.store(at + t * channels, total, mask=out < channels)
