"""Tiles and programs, for shapes of all sizes."""

import itertools

from bnet_mm.ops.triton import plans

SIZES = (1, 2, 3, 7, 8, 14, 17, 56, 83, 127, 130, 200, 336, 3000)


def test_plans_cover_every_map_once():
    for height, width, channels, k in itertools.product(SIZES, SIZES, (1, 3, 64, 256, 2048), (1, 3, 5, 7)):
        for samples, channels_last, sums in itertools.product((1, 64), (False, True), (False, True)):
            by_sample = samples == 64 and k == 3
            plan = plans.plan_windows((samples, channels, height, width), k, channels_last, by_sample, sums)
            tile = plan.tile
            across, along = (tile.inner, tile.outer) if channels_last else (tile.outer, tile.inner)
            assert covers(plan.tiles, across, channels) and covers(plan.column_tiles, along * plans.COLUMNS, width)
            assert covers(plan.strips, plan.rows_each, height)
            assert covers(plan.groups, plan.items_each, samples * plan.column_tiles)
            assert not by_sample or plan.items_each == plan.column_tiles
            assert all(value & (value - 1) == 0 for value in tile) and tile.outer * tile.inner <= 128
            assert width % tile.vector == 0
            terms = plan.rows_each * plans.COLUMNS * plan.items_each
            assert by_sample or terms <= max(plans.TERMS, plan.rows_each * plans.COLUMNS)
            assert plan.rows_each * plans.COLUMNS <= plans.TERMS


def covers(parts, size, length):
    return (parts - 1) * size < length <= parts * size


def test_rows_of_sums_are_little_beside_the_maps():
    """At most 5 % of the bytes of x, the gradient and grad_x, at the shapes of ResNet-50 and of detectors."""
    shapes = (
        (16, 256, 200, 336), (64, 1024, 14, 14), (64, 2048, 7, 7), (1, 256, 200, 334), (8, 256, 56, 56),
    )  # fmt: skip
    for shape, k, channels_last, item in itertools.product(shapes, (3, 5, 7), (False, True), (2, 4)):
        plan = plans.plan_windows(shape, k, channels_last, False, True)
        written = plan.groups * plan.strips * shape[1] * (k * k + 3) * 4
        assert written <= 0.05 * 3 * item * shape[0] * shape[1] * shape[2] * shape[3], (shape, k, channels_last, item)


def test_few_variants_for_all_sizes_of_images():
    """What a detector with images of many sizes compiles: at most 12 of each (k, dtype, layout)."""
    sides = range(480, 801, 32), range(480, 1345, 32)
    sizes = {size for height, width in itertools.product(*sides) for size in ((height, width), (width, height))}
    for channels_last in (False, True):
        tiles = {
            plans.window_tile(64 * stride, parts(width, stride), channels_last)
            for (_, width), stride in itertools.product(sizes, (4, 8, 16, 32))
        }
        assert len(tiles) <= 12, tiles


def parts(length, size):
    return -(-length // size)


def test_plans_of_the_benchmarked_layers():
    """The table as it stands; a change of it is a change of speed, never of results."""
    big, small = (16, 256, 200, 336), (64, 1024, 14, 14)
    tiles = {
        (big, False): (16, 8, 4), (big, True): (2, 64, 4), (small, False): (8, 4, 2), (small, True): (2, 64, 1),
    }  # fmt: skip
    for (shape, channels_last), tile in tiles.items():
        for k, sums in itertools.product((3, 5, 7), (False, True)):
            plan = plans.plan_windows(shape, k, channels_last, False, sums)
            assert plan.tile == tile
            lanes = plan.programs * tile[0] * tile[1]
            assert plans.LANES // 8 <= lanes <= 4 * plans.LANES, (shape, channels_last, k, plan, lanes)


def test_plans_of_pixels_cover_every_map_once():
    for height, width, channels in itertools.product(SIZES, SIZES, (1, 3, 64, 256, 2048)):
        for samples, channels_last, by_sample in itertools.product((1, 64), (False, True), (False, True)):
            plan = plans.plan_pixels((samples, channels, height, width), channels_last, by_sample)
            tile, pixels = plan.tile, height * width
            across, along = (tile.inner, tile.outer) if channels_last else (tile.outer, tile.inner)
            strip = plan.strip_vectors * (1 if channels_last else tile.vector)
            assert covers(plan.tiles, across, channels) and covers(plan.strips, strip, pixels) and strip % along == 0
            assert covers(plan.groups, plan.samples_each, samples) and not (by_sample and plan.samples_each > 1)
            assert (channels if channels_last else pixels) % tile.vector == 0 and tile.outer * tile.inner <= 512
            assert strip // along * plan.samples_each <= plans.TERMS
