"""How a call is cut into programs: plain functions of the shape, which never change what comes out."""

from __future__ import annotations

from typing import NamedTuple

import torch

PROGRAMS = 4096  # as many as fill an H200 (132 multiprocessors with 8 programs each) four times
TERMS = 2048  # at most, that one lane adds in float32


class Tile(NamedTuple):
    """``outer * inner`` lanes (see the module), each with ``rows * columns`` outputs at a time."""

    outer: int
    inner: int
    rows: int
    columns: int


class Plan(NamedTuple):
    """How a call is cut into programs: tiles of channels and columns x strips of rows x groups of samples."""

    tile: Tile
    tiles: int
    column_tiles: int
    strips: int
    rows_each: int
    groups: int
    samples_each: int

    @property
    def programs(self) -> int:
        return self.tiles * self.strips * self.groups


def warps(tile: Tile) -> int:
    return max(1, min(4, tile.outer * tile.inner // 32))


def window_tile(channels: int, height: int, width: int, k: int, channels_last: bool, item: int) -> Tile:
    """The tile of forward and backward for elements of ``item`` bytes: 128 lanes, fewer on small maps.

    NCHW: a warp reads 32 neighbouring columns at most, or several narrow maps; of the sizes 32, 64 and 128 that which
    leaves the fewest lanes beyond the map. A lane has 8 rows of one column, as neighbouring lanes should read
    neighbouring words, so of two columns in 16 bits. channels_last: a warp reads 32 neighbouring channels; a lane has
    4 x 4 pixels, as neighbouring columns are far apart in memory and re-used in registers only. Fewer where taps and
    their sums fill the registers.
    """
    if channels_last:
        rows, columns = 4, 2 if k == 7 else 4
    elif item == 2 and k > 1:
        rows, columns = 8 if k == 3 else 4, 2
    else:
        rows, columns = 8, 1
    rows, columns = min(rows, _power_of_two(height)), min(columns, _power_of_two(width))
    groups = parts(width, columns)
    if channels_last:
        inner = min(64, _power_of_two(channels))
        return Tile(min(128 // inner, _power_of_two(groups)), inner, rows, columns)
    if groups <= 16:
        inner = max(4, _power_of_two(groups))
    else:
        inner = min((128, 64, 32), key=lambda size: parts(groups, size) * size)
    return Tile(min(128 // inner, _power_of_two(channels)), inner, rows, columns)


def pixel_tile(channels: int, pixels: int, channels_last: bool) -> Tile:
    """The tile of the kernels without taps: 128 threads with 4 neighbouring values; ``rows`` lines (see _pixels)."""
    if channels_last:
        inner = min(256, _power_of_two(channels))
        return Tile(min(512 // inner, _power_of_two(pixels)), inner, 8, 1)
    inner = min(512, _power_of_two(pixels))
    return Tile(min(512 // inner, _power_of_two(channels)), inner, 8, 1)


def plan_windows(shape: torch.Size, k: int, channels_last: bool, item: int, by_sample: bool) -> Plan:
    """The programs of forward and backward; ``by_sample``: none has more than one sample.

    Long programs where there are enough of them, as each begins with the taps and ends with sums over its lanes.
    """
    samples, channels, height, width = shape
    tile = window_tile(channels, height, width, k, channels_last, item)
    channel_tiles = parts(channels, tile.inner if channels_last else tile.outer)
    column_tiles = parts(width, (tile.outer if channels_last else tile.inner) * tile.columns)
    bands = parts(height, tile.rows)
    enough = channel_tiles * column_tiles * samples / PROGRAMS  # programs of one sample each, to those wanted
    most = TERMS // (tile.rows * tile.columns)
    bands_each = min(bands, most, max(1, int(bands * enough)))
    samples_each = 1
    if bands_each == bands and not by_sample:
        samples_each = min(samples, max(1, int(enough)), max(1, most // bands))
    strips, groups = parts(bands, bands_each), parts(samples, samples_each)
    return Plan(tile, channel_tiles * column_tiles, column_tiles, strips, bands_each * tile.rows, groups, samples_each)


def plan_pixels(shape: torch.Size, channels_last: bool, by_sample: bool) -> Plan:
    """The programs of moments, by the same rule; a group is a sample or the batch, its rows are lines (_pixels)."""
    samples, channels, height, width = shape
    tile = pixel_tile(channels, height * width, channels_last)
    tiles = parts(channels, tile.inner if channels_last else tile.outer)
    lines = parts(height * width, tile.outer if channels_last else tile.inner)
    groups, samples_each = (samples, 1) if by_sample else (1, samples)
    steps = parts(lines * samples_each, tile.rows)
    steps_each = min(steps, TERMS // tile.rows, max(1, int(steps * tiles * groups / PROGRAMS)))
    return Plan(tile, tiles, 1, parts(steps, steps_each), steps_each * tile.rows, groups, samples_each)


def parts(length: int, size: int) -> int:
    return -(-length // size)


def _power_of_two(at_least: int) -> int:
    return 1 << max(0, at_least - 1).bit_length()
