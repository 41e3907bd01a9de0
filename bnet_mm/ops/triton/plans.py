"""How a call is cut into programs: plain functions of the shape, which never change what comes out."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

PROGRAMS = 4096  # as many as fill an H200 (132 multiprocessors with 8 programs each) four times
LANES = 128 * 1056  # of forward and backward: as many as fill it twice, with 128 registers each
TERMS = 2048  # at most, that one lane adds in float32
SUMS = 20  # pixels, at least, for each sum that a program writes
COLUMNS = 4  # of a lane; kernels/lanes.py


class WindowTile(NamedTuple):
    """``outer * inner`` lanes of forward and backward, which load ``vector`` columns at a time (kernels/lanes.py)."""

    outer: int
    inner: int
    vector: int

    @property
    def lanes(self) -> int:
        return self.outer * self.inner


class WindowPlan(NamedTuple):
    """Programs of forward and backward: tiles of channels x strips of rows x groups of items.

    An item is a tile of columns of a sample; a program has ``items_each`` of them one after the other.
    """

    tile: WindowTile
    tiles: int
    column_tiles: int
    strips: int
    rows_each: int
    items_each: int
    groups: int

    @property
    def programs(self) -> int:
        return self.tiles * self.strips * self.groups


class Tile(NamedTuple):
    """``outer * inner`` lanes (see the module), each with ``rows * columns`` outputs at a time."""

    outer: int
    inner: int
    rows: int
    columns: int

    @property
    def lanes(self) -> int:
        return self.outer * self.inner


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


def window_tile(channels: int, width: int, channels_last: bool) -> WindowTile:
    """The tile of forward and backward: 128 lanes, fewer on small maps.

    NCHW: up to 32 lanes along a row, such that the fewest lie beyond the map. Where rows do not begin at multiples of
    four columns, lanes exchange what they load, and programs are single warps, in which this takes no barrier.
    channels_last: a warp reads 32 neighbouring channels.
    """
    groups = parts(width, COLUMNS)
    if channels_last:
        inner = min(64, _power_of_two(channels))
        return WindowTile(min(128 // inner, _power_of_two(groups)), inner, COLUMNS if width % COLUMNS == 0 else 1)
    vector = math.gcd(width, COLUMNS)
    lanes = 128 if vector == COLUMNS else 32
    inner = _power_of_two(groups) if groups <= 4 else min((32, 16, 8), key=lambda size: parts(groups, size) * size)
    return WindowTile(min(lanes // inner, _power_of_two(channels)), inner, vector)


def pixel_tile(channels: int, pixels: int, channels_last: bool) -> Tile:
    """The tile of the kernels without taps: 128 threads with 4 neighbouring values; ``rows`` lines (see _pixels)."""
    if channels_last:
        inner = min(256, _power_of_two(channels))
        return Tile(min(512 // inner, _power_of_two(pixels)), inner, 8, 1)
    inner = min(512, _power_of_two(pixels))
    return Tile(min(512 // inner, _power_of_two(channels)), inner, 8, 1)


def plan_windows(shape: torch.Size, k: int, channels_last: bool, by_sample: bool, sums: bool) -> WindowPlan:
    """The programs of forward and backward. ``by_sample``: none has more than one sample; ``sums``: each writes a row.

    Strips are long, as each loads k - 1 rows of its neighbours, at most a sixteenth of its own; programs have more than
    one item where there are enough of them, and where their rows of sums would be much beside the map.
    """
    samples, channels, height, width = shape
    tile = window_tile(channels, width, channels_last)
    tiles = parts(channels, tile.inner if channels_last else tile.outer)
    column_tiles = parts(width, (tile.outer if channels_last else tile.inner) * COLUMNS)
    items = samples * column_tiles
    wanted = parts(LANES, tile.outer * tile.inner * tiles)  # programs of each tile of channels
    strips = max(1, min(height // max(8, 16 * (k - 1)), parts(wanted, items)), parts(height, TERMS // COLUMNS))
    rows_each = parts(height, strips)
    items_each = max(1, items * strips // wanted)
    if sums:
        pixels = rows_each * min(width, parts(width, column_tiles))
        items_each = max(items_each, parts(SUMS * (k * k + 3), pixels))
    items_each = min(items_each, max(1, TERMS // (rows_each * COLUMNS)), items)
    if by_sample:
        items_each = column_tiles
    strips, groups = parts(height, rows_each), parts(items, items_each)
    return WindowPlan(tile, tiles, column_tiles, strips, rows_each, items_each, groups)


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
