"""The forward kernel."""

from __future__ import annotations

import triton
import triton.language as tl

from bnet_mm.ops.triton.kernels.lanes import (
    COLUMNS,
    NUMBERS,
    block_columns,
    correlate,
    join,
    lane_channels,
    lane_columns,
    load_row,
    load_taps,
    row_centres,
    row_masks,
    row_values,
    rows_from,
    steps,
    zeros,
)


@triton.jit
def _store(value, residual, y, mask, RESIDUAL: tl.constexpr, RELU: tl.constexpr):
    if RESIDUAL:
        value += tl.load(residual, mask=mask, other=0.0).to(tl.float32)
    if RELU:
        value = tl.where(value < 0, 0.0, value)  # NaN stays
    tl.store(y, value.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _store_row(sums, scale, shift, residual, y, masks, step_w, LANES: tl.constexpr,
               CHANNELS_LAST: tl.constexpr, RESIDUAL: tl.constexpr, RELU: tl.constexpr):  # fmt: skip
    """The first row of ``sums`` goes to the line ``y``."""
    row = ()
    for e in tl.static_range(COLUMNS):
        row = row + (sums[e] * scale + shift,)
    if CHANNELS_LAST:
        for e in tl.static_range(COLUMNS):
            _store(row[e], residual + e * step_w, y + e * step_w, masks[e], RESIDUAL, RELU)
    else:
        _store(join(row, LANES), block_columns(residual, 0, COLUMNS), block_columns(y, 0, COLUMNS), masks[0], RESIDUAL,
               RELU)  # fmt: skip


@triton.jit(do_not_specialize=NUMBERS)
def forward_kernel(
    x, mean, rstd, weight, bias, residual, y, saved_mean, saved_rstd, eps,
    samples, channels, height, vectors, sample_step, tiles, column_tiles, strips, rows_each, items_each,
    K: tl.constexpr, OUTER: tl.constexpr, INNER: tl.constexpr, VECTOR: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, RESIDUAL: tl.constexpr, RELU: tl.constexpr, VARIANCE: tl.constexpr,
    NORMALISED: tl.constexpr,
):  # fmt: skip
    """VARIANCE: ``rstd`` is the variance; mean and inverse deviation are saved, (C,). NORMALISED: else these are not
    read, and taken to be 0 and 1."""
    LANES: tl.constexpr = OUTER * INNER
    REACH: tl.constexpr = K // 2
    program = tl.program_id(0)
    strip = program // tiles % strips
    group = program // tiles // strips
    width = vectors * VECTOR
    step_n, step_c, step_h, step_w = steps(channels, height, width, CHANNELS_LAST)
    channel = lane_channels(program % tiles, OUTER, INNER, CHANNELS_LAST)
    here = channel < channels
    channel = tl.minimum(channel, channels - 1)
    taps = load_taps(weight, channel, K * K)
    shift = tl.load(bias + channel)
    begin = strip * rows_each
    end = tl.minimum(begin + rows_each, height)
    first = tl.maximum(begin - REACH, 0)
    last = tl.minimum(end + REACH, height)
    for item in range(group * items_each, tl.minimum((group + 1) * items_each, samples * column_tiles)):
        n = item // column_tiles
        column = lane_columns(item % column_tiles, OUTER, INNER, CHANNELS_LAST)
        stored = row_masks(tl.where(here, column, width), width, 0, VECTOR, CHANNELS_LAST)
        column = tl.minimum(column, (width - 1) // COLUMNS * COLUMNS)
        around = row_masks(column, width, REACH, VECTOR, CHANNELS_LAST)
        if NORMALISED:
            centre = tl.load(mean + n * sample_step + channel)
            scale = tl.load(rstd + n * sample_step + channel)
        else:
            centre = tl.zeros((LANES,), tl.float32)
            scale = tl.full((LANES,), 1.0, tl.float32)
        if VARIANCE:
            if NORMALISED:
                scale = tl.div_rn(1.0, tl.sqrt_rn(scale + eps))
            if (item == 0) & (strip == 0):
                tl.store(saved_mean + channel, centre)  # by all lanes of a channel, the same
                tl.store(saved_rstd + channel, scale)
        centres = row_centres(around, centre, REACH, VECTOR, CHANNELS_LAST)
        sums = zeros(LANES, (K - 1) * COLUMNS)
        place = n * step_n + channel * step_c + column * step_w
        line = x + (place + first * step_h)
        residual_line = residual + (place + begin * step_h)
        y_line = y + (place + begin * step_h)
        parts = load_row(line, around, step_w, REACH, VECTOR, CHANNELS_LAST)
        values = row_values(parts, centres, LANES, REACH, CHANNELS_LAST, True)
        for row in range(first, last):
            # The next row is under way while this one is used; after the last it is that again.
            line += tl.where(row + 1 < last, step_h, 0)
            parts = load_row(line, around, step_w, REACH, VECTOR, CHANNELS_LAST)
            outputs = correlate(sums, taps, values, K, False)
            if row >= begin + REACH:
                _store_row(outputs, scale, shift, residual_line, y_line, stored, step_w, LANES,
                           CHANNELS_LAST, RESIDUAL, RELU)  # fmt: skip
                residual_line += step_h
                y_line += step_h
            sums = rows_from(outputs, 1, K - 1)
            values = row_values(parts, centres, LANES, REACH, CHANNELS_LAST, True)
        # The last rows get nothing from below the map. (Those from REACH on are none; LLVM does better with all sums.)
        for o in tl.static_range(K - 1):
            if (last - REACH + o >= begin) & (last - REACH + o < end):
                _store_row(rows_from(sums, o, 1), scale, shift, residual_line, y_line, stored, step_w, LANES,
                           CHANNELS_LAST, RESIDUAL, RELU)  # fmt: skip
                residual_line += step_h
                y_line += step_h
