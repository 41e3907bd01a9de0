"""How a call is cut into programs: plain functions of the shape, which never change what comes out."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

PROGRAMS = 2 * 132 * 16  # of the kernels without taps: as many as fill an H100's multiprocessors twice
LANES = 128 * 1056  # of forward and backward: as many as fill it twice, with 128 registers each
TERMS = 2048  # at most, that one lane adds in float32
SUMS = 26  # pixels, at least, for each sum that a program writes
STEPS = 64  # of a program without taps, at least: it begins with addresses and ends with sums over lanes
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


class PixelTile(NamedTuple):
    """``outer * inner`` values that a program of the kernels without taps reads at a time (kernels/moments.py)."""

    outer: int
    inner: int
    vector: int

    @property
    def lanes(self) -> int:
        return max(1, self.outer * self.inner // COLUMNS)


class PixelPlan(NamedTuple):
    """Programs of these kernels: tiles of channels x strips of pixels x groups of samples.

    A strip has ``strip_vectors`` vectors of pixels in NCHW, single pixels in channels_last.
    """

    tile: PixelTile
    tiles: int
    strips: int
    strip_vectors: int
    samples_each: int
    groups: int

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
        inner = min(64, power_of_two(channels))
        return WindowTile(min(128 // inner, power_of_two(groups)), inner, COLUMNS if width % COLUMNS == 0 else 1)
    vector = math.gcd(width, COLUMNS)
    lanes = 128 if vector == COLUMNS else 32
    inner = power_of_two(groups) if groups <= 4 else min((32, 16, 8), key=lambda size: parts(groups, size) * size)
    return WindowTile(min(lanes // inner, power_of_two(channels)), inner, vector)


def pixel_tile(channels: int, pixels: int, channels_last: bool) -> PixelTile:
    """The tile of the kernels without taps: four values for each of 128 lanes, the fewest beyond the map."""
    if channels_last:
        inner = min(256, power_of_two(channels))
        return PixelTile(min(512 // inner, power_of_two(pixels)), inner, math.gcd(channels, COLUMNS))
    sizes = [size for size in (256, 128, 64, 32, 16) if 8 * size <= pixels] + [8 if pixels >= 64 else 4]
    inner = min(sizes, key=lambda size: parts(pixels, size) * size)
    return PixelTile(min(512 // inner, power_of_two(channels)), inner, math.gcd(pixels, COLUMNS))


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


def plan_pixels(shape: torch.Size, channels_last: bool, by_sample: bool) -> PixelPlan:
    """The programs of the kernels without taps; ``by_sample``: none has more than one sample."""
    samples, channels, height, width = shape
    pixels = height * width
    tile = pixel_tile(channels, pixels, channels_last)
    tiles = parts(channels, tile.inner if channels_last else tile.outer)
    step = tile.outer if channels_last else tile.inner
    steps = parts(pixels, step)
    wanted = parts(PROGRAMS, tiles)  # programs of each tile of channels
    strips = max(1, min(steps // STEPS, parts(wanted, samples)), parts(steps, TERMS))
    steps_each = parts(steps, strips)
    samples_each = max(samples * parts(steps, steps_each) // wanted, STEPS // steps_each)
    samples_each = 1 if by_sample else max(1, min(samples, samples_each, TERMS // steps_each))
    strip = steps_each * step // (1 if channels_last else tile.vector)
    return PixelPlan(tile, tiles, parts(steps, steps_each), strip, samples_each, parts(samples, samples_each))


def parts(length: int, size: int) -> int:
    return -(-length // size)


def power_of_two(at_least: int) -> int:
    return 1 << max(0, at_least - 1).bit_length()
