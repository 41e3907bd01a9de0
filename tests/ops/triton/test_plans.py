"""Tiles and programs, for shapes of all sizes."""

import itertools

from bnet_mm.ops.triton import plans


def test_plans_cover_every_map_once():
    sizes = (1, 2, 3, 7, 8, 14, 17, 56, 127, 130, 200, 336, 3000)
    for height, width, channels, k in itertools.product(sizes, sizes, (1, 3, 64, 256, 2048), (1, 3, 5, 7)):
        for samples, channels_last, item in itertools.product((1, 64), (False, True), (2, 4)):
            plan = plans.plan_windows((samples, channels, height, width), k, channels_last, item, samples == 64)
            tile = plan.tile
            across, along = (tile.inner, tile.outer) if channels_last else (tile.outer, tile.inner)
            channel_tiles, rest = divmod(plan.tiles, plan.column_tiles)
            assert rest == 0 and covers(channel_tiles, across, channels)
            assert covers(plan.column_tiles, along * tile.columns, width)
            assert plan.rows_each % tile.rows == 0 and covers(plan.strips, plan.rows_each, height)
            assert covers(plan.groups, plan.samples_each, samples) and (samples == 1 or plan.samples_each == 1)
            assert all(value & (value - 1) == 0 for value in tile) and tile.outer * tile.inner <= 128
            assert plan.rows_each * tile.columns * plan.samples_each <= max(plans.TERMS, tile.rows * tile.columns)
            assert plans.warps(tile) in (1, 2, 4)


def covers(parts, size, length):
    return (parts - 1) * size < length <= parts * size


def test_plans_of_the_benchmarked_layers():
    """The table as it stands; a change of it is a change of speed, never of results."""
    big, small = (16, 256, 200, 336), (64, 1024, 14, 14)
    tiles = {
        (big, 3, False, 4): (4, 32, 8, 1), (big, 3, False, 2): (2, 64, 8, 2), (big, 7, False, 2): (2, 64, 4, 2),
        (big, 5, True, 4): (2, 64, 4, 4), (big, 7, True, 2): (2, 64, 4, 2), (big, 1, False, 2): (4, 32, 8, 1),
        (small, 3, False, 4): (8, 16, 8, 1), (small, 3, False, 2): (16, 8, 8, 2), (small, 5, True, 2): (2, 64, 4, 4),
    }  # fmt: skip
    for (shape, k, channels_last, item), tile in tiles.items():
        plan = plans.plan_windows(shape, k, channels_last, item, False)
        assert plan.tile == tile and 2000 <= plan.programs <= 20000, (shape, k, channels_last, item, plan)
    for shape, channels_last in itertools.product((big, small), (False, True)):
        assert 1000 <= plans.plan_pixels(shape, channels_last, False).programs <= 20000
