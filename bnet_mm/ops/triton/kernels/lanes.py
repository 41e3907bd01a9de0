"""Lanes, and the rows that they stream: each lane has COLUMNS neighbouring columns of one channel.

A row is held as it is loaded until it is used, one step later: in NCHW as blocks (lanes, columns), left, own and right,
which Triton loads by vectors; in channels_last as single columns, as neighbouring lanes are neighbours in memory there.
"""

from __future__ import annotations

import triton
import triton.language as tl

COLUMNS = tl.constexpr(4)
# All numbers but the constants of a kernel may change without compilation.
NUMBERS = [
    'samples', 'channels', 'height', 'vectors', 'sample_step', 'tiles', 'column_tiles', 'strips', 'rows_each',
    'items_each',
]  # fmt: skip


@triton.jit
def lane_channels(tile, OUTER: tl.constexpr, INNER: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    lane = tl.arange(0, OUTER * INNER)
    return tile * INNER + lane % INNER if CHANNELS_LAST else tile * OUTER + lane // INNER


@triton.jit
def lane_columns(tile, OUTER: tl.constexpr, INNER: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """The first column of each lane."""
    lane = tl.arange(0, OUTER * INNER)
    return (tile * OUTER + lane // INNER if CHANNELS_LAST else tile * INNER + lane % INNER) * COLUMNS


@triton.jit
def steps(channels, height, width, CHANNELS_LAST: tl.constexpr):
    """Distances in memory of neighbouring samples, channels, rows and columns; 64 bits."""
    one = tl.full((), 1, tl.int64)  # maps may have more than 2^31 elements
    if CHANNELS_LAST:
        found = (one * height * width * channels, one, one * width * channels, one * channels)
    else:
        found = (one * height * width * channels, one * height * width, one * width, one)
    return found


@triton.jit
def zeros(LANES: tl.constexpr, COUNT: tl.constexpr):
    values = ()
    for _ in tl.static_range(COUNT):
        values = values + (tl.zeros((LANES,), tl.float32),)
    return values


@triton.jit
def load_taps(weight, channel, COUNT: tl.constexpr):
    taps = ()
    for t in tl.static_range(COUNT):
        taps = taps + (tl.load(weight + channel * COUNT + t),)
    return taps


@triton.jit
def split(block, LANES: tl.constexpr, SPAN: tl.constexpr):
    """The columns of a block (LANES, SPAN), SPAN 1, 2 or 4."""
    if SPAN == 1:
        columns = (tl.reshape(block, (LANES,)),)
    elif SPAN == 2:
        columns = tl.split(block)
    else:
        even, odd = tl.split(tl.reshape(block, (LANES, 2, 2)))
        first, third = tl.split(even)
        second, fourth = tl.split(odd)
        columns = (first, second, third, fourth)
    return columns


@triton.jit
def join(values, LANES: tl.constexpr):
    """The block (LANES, COLUMNS) of four columns."""
    return tl.reshape(tl.join(tl.join(values[0], values[2]), tl.join(values[1], values[3])), (LANES, COLUMNS))


@triton.jit
def block_columns(column, START: tl.constexpr, SPAN: tl.constexpr):
    return column[:, None] + (START + tl.arange(0, SPAN)[None, :])


@triton.jit
def on_map(column, width, START: tl.constexpr, SPAN: tl.constexpr, VECTOR: tl.constexpr):
    """Which columns of a block are on the map; one answer for the columns of a vector."""
    SIZE: tl.constexpr = min(SPAN, VECTOR)
    first = column[:, None] + (START + tl.arange(0, SPAN)[None, :] // SIZE * SIZE)
    return (first >= 0) & (first < width)


@triton.jit
def row_masks(column, width, REACH: tl.constexpr, VECTOR: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """What of a row and REACH columns on each side is on the map, in the parts that load_row returns."""
    HALO: tl.constexpr = REACH + REACH // 3
    masks = ()
    if CHANNELS_LAST:
        for s in tl.static_range(COLUMNS + 2 * REACH):
            at = column + (s - REACH)
            masks = masks + ((at >= 0) & (at < width),)
    elif REACH == 0:
        masks = (on_map(column, width, 0, COLUMNS, VECTOR),)
    else:
        masks = (
            on_map(column, width, -HALO, HALO, VECTOR),
            on_map(column, width, 0, COLUMNS, VECTOR),
            on_map(column, width, COLUMNS, HALO, VECTOR),
        )
    return masks


@triton.jit
def _load(at, mask, ALL: tl.constexpr):
    if ALL:
        value = tl.load(at)
    else:
        value = tl.load(at, mask=mask, other=0.0)
    return value


@triton.jit
def load_row(line, masks, step_w, REACH: tl.constexpr, VECTOR: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """A row as it lies in memory, in parts; 0 off the map."""
    HALO: tl.constexpr = REACH + REACH // 3
    ALL: tl.constexpr = VECTOR == COLUMNS  # a lane's own columns are on the map
    parts = ()
    if CHANNELS_LAST:
        for s in tl.static_range(COLUMNS + 2 * REACH):
            at = line + (s - REACH) * step_w
            parts = parts + (_load(at, masks[s], ALL and s >= REACH and s < REACH + COLUMNS),)
    elif REACH == 0:
        parts = (_load(block_columns(line, 0, COLUMNS), masks[0], ALL),)
    else:
        parts = (
            _load(block_columns(line, -HALO, HALO), masks[0], False),
            _load(block_columns(line, 0, COLUMNS), masks[1], ALL),
            _load(block_columns(line, COLUMNS, HALO), masks[2], False),
        )
    return parts


@triton.jit
def row_centres(masks, mean, REACH: tl.constexpr, VECTOR: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """What is subtracted from each part: the mean, but 0 from the zeros off the map."""
    ALL: tl.constexpr = VECTOR == COLUMNS
    centres = ()
    for s in tl.static_range(len(masks)):
        if CHANNELS_LAST:
            if ALL and s >= REACH and s < REACH + COLUMNS:
                centres = centres + (mean,)
            else:
                centres = centres + (tl.where(masks[s], mean, 0.0),)
        elif ALL and (REACH == 0 or s == 1):
            centres = centres + (mean[:, None],)
        else:
            centres = centres + (tl.where(masks[s], mean[:, None], 0.0),)
    return centres


@triton.jit
def row_values(parts, centres, LANES: tl.constexpr, REACH: tl.constexpr, CHANNELS_LAST: tl.constexpr,
               CENTRED: tl.constexpr):  # fmt: skip
    """The COLUMNS + 2 * REACH values of a row in float32, less their centres if CENTRED."""
    HALO: tl.constexpr = REACH + REACH // 3
    values = ()
    for p in tl.static_range(len(parts)):
        part = parts[p].to(tl.float32)
        if CENTRED:
            part = part - centres[p]
        if CHANNELS_LAST:
            values = values + (part,)
        elif REACH == 0 or p == 1:
            values = values + split(part, LANES, COLUMNS)
        else:
            columns = split(part, LANES, HALO)
            for s in tl.static_range(REACH):
                if p == 0:
                    values = values + (columns[HALO - REACH + s],)
                else:
                    values = values + (columns[s],)
    return values


@triton.jit
def correlate(sums, taps, values, K: tl.constexpr, FLIPPED: tl.constexpr):
    """K rows of outputs, of which the first is now complete: ``sums``, K - 1 rows, plus what the next row gives."""
    new = ()
    for o in tl.static_range(K):
        for e in tl.static_range(COLUMNS):
            for j in tl.static_range(K):
                if FLIPPED:
                    tap = taps[o * K + K - 1 - j]
                else:
                    tap = taps[(K - 1 - o) * K + j]
                if j > 0:
                    total = tl.fma(tap, values[e + j], total)  # noqa: F821 (of the steps before)
                elif o < K - 1:
                    total = tl.fma(tap, values[e], sums[o * COLUMNS + e])
                else:
                    total = tap * values[e]
            new = new + (total,)
    return new


@triton.jit
def correlate_taps(sums, rows, values, K: tl.constexpr):
    """The K * K sums of ``rows``, K of them, times the gradient, plus what a row of the gradient gives."""
    new = ()
    for i in tl.static_range(K):
        for j in tl.static_range(K):
            total = sums[i * K + j]
            for e in tl.static_range(COLUMNS):
                total = tl.fma(rows[i * COLUMNS + e], values[e + K - 1 - j], total)
            new = new + (total,)
    return new


@triton.jit
def rows_from(values, FIRST: tl.constexpr, COUNT: tl.constexpr):
    """COUNT rows of COLUMNS values each, from row FIRST on."""
    found = ()
    for i in tl.static_range(FIRST * COLUMNS, (FIRST + COUNT) * COLUMNS):
        found = found + (values[i],)
    return found


@triton.jit
def sum_columns(values, left, FIRST: tl.constexpr, VECTOR: tl.constexpr):
    """The sum of a lane's COLUMNS values from FIRST on, of those of ``left`` columns, the map's last ones."""
    if VECTOR == COLUMNS:
        total = (values[FIRST] + values[FIRST + 1]) + (values[FIRST + 2] + values[FIRST + 3])
        total = tl.where(left > 0, total, 0.0)
    else:
        total = tl.where(left > 0, values[FIRST], 0.0)
        for e in tl.static_range(1, COLUMNS):
            total += tl.where(left > e, values[FIRST + e], 0.0)
    return total


@triton.jit
def sum_lanes(values, OUTER: tl.constexpr, INNER: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """The sums (channels of a program, 4) of four values over the lanes of a channel."""
    block = join(values, OUTER * INNER)
    return tl.sum(tl.reshape(block, (OUTER, INNER, COLUMNS)), 0 if CHANNELS_LAST else 1)
