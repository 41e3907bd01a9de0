"""A look at every image of a user's folder, and at its labels: the usual mistakes, a sentence with the file each."""

from __future__ import annotations

from collections.abc import Iterable

import cv2
import numpy as np
from PIL import Image

from bnet_mm.datasets.custom.folder import Folder, Found, Labelled
from bnet_mm.datasets.custom.labels import POLYGON
from bnet_mm.datasets.custom.masks import MOST, number_classes, values_of
from bnet_mm.datasets.readers import pixels

ORIENTATION = 274  # the EXIF tag
TURNED = 5  # from this orientation on, width and height are exchanged
ROUNDING = 1.0  # pixels that a box may stand out without a word
DEEP = ('.png', '.tif', '.tiff')  # may have 16 bits, of which Pillow does not tell


def look(folder: Folder, found: Found, samples: Iterable[Labelled]) -> dict[int, int]:
    """Open each image, and its mask, and compare the labels with it; what is wrong goes into ``found``.

    Sizes are filled in, boxes cut at the border of their image.

    Returns:
        Value in the masks -> class; empty without masks.
    """
    values: set[int] = set()
    for sample in samples:
        try:
            size = _look_at_image(folder, found, sample)
            if sample.mask:
                mask = values_of(folder.root / sample.mask)
                if len(in_mask := np.unique(mask)) > MOST:
                    raise ValueError(f'{sample.mask} has {len(in_mask)} different values, a mask has one a class')
                values |= set(in_mask.tolist())
                if mask.shape != size[::-1]:
                    found.problems.append(f'{sample.mask} is {mask.shape[1]} x {mask.shape[0]}, its image {_by(size)}')
        except (OSError, ValueError) as error:
            found.problems.append(' '.join(str(error).replace(f'{folder.root}/', '').split()))
            continue
        sample.size = size
        _look_at_boxes(found, sample)
    _look_at_whole(folder, found)
    return number_classes(folder, found, values) if values else {}


def _look_at_image(folder: Folder, found: Found, sample: Labelled) -> tuple[int, int]:
    """(width, height) as OpenMMLab reads it: upright."""
    path = folder.root / sample.file
    pixels(path)
    with Image.open(path) as image:
        raw, mode, orientation = image.size, image.mode, image.getexif().get(ORIENTATION, 1)
    decoded = cv2.imread(str(path), cv2.IMREAD_ANYDEPTH) if path.suffix.lower() in DEEP else np.empty(0, np.uint8)
    if decoded is None:
        raise ValueError(f'{sample.file} cannot be decoded by OpenCV')
    if decoded.dtype != np.uint8:
        found.notes['more than 8 bits a channel, read as 8'].append(sample.file)
    if mode in ('1', 'L', 'LA') or mode.startswith('I'):
        found.notes['grey, read as three equal channels'].append(sample.file)
    upright = raw[::-1] if orientation >= TURNED else raw
    if sample.size not in (None, upright, raw):
        raise ValueError(f'{sample.file} is {_by(upright)}, in {sample.labels} {_by(sample.size)}')
    if sample.size not in (None, upright):
        raise ValueError(
            f'{sample.file} is turned by its EXIF orientation, {orientation}, when it is read, and {sample.labels} is '
            f'for the picture before, {_by(raw)}: save it upright'
        )
    if orientation != 1 and (sample.size is None or orientation < TURNED):
        found.notes['turned by EXIF orientation, with labels taken for the upright picture'].append(sample.file)
    return upright


def _look_at_boxes(found: Found, sample: Labelled) -> None:
    width, height = sample.size or (0, 0)
    for one in sample.objects:
        left, top, wide, high = (float(value) for value in one['bbox'])
        inside = max(left, 0.0), max(top, 0.0), min(left + wide, width), min(top + high, height)
        box = f'[{left:.1f}, {top:.1f}, {wide:.1f}, {high:.1f}] of {one["category"]!r} in {sample.labels}'
        if not (wide > 0 and high > 0):
            found.problems.append(f'the box {box} has no area')
        elif not (inside[2] > inside[0] and inside[3] > inside[1]):
            found.problems.append(f'the box {box} is outside of {sample.file}, {width} x {height}')
        polygons = one.get('segmentation', [])
        if isinstance(polygons, list) and any(len(polygon) < POLYGON or len(polygon) % 2 for polygon in polygons):
            found.problems.append(f'a polygon of the box {box} has fewer than three points or half of one')
        if max(-left, -top, left + wide - width, top + high - height) > ROUNDING:
            found.notes['boxes cut at the border of their image'].append(box)
        one['bbox'] = [inside[0], inside[1], inside[2] - inside[0], inside[3] - inside[1]]


def _look_at_whole(folder: Folder, found: Found) -> None:
    """What no single image shows: no labels at all, empty splits, images in none, images without objects."""
    if not found.samples:
        found.problems.append(f'{folder.root} has no image with labels')
        return
    if not any(sample.objects or sample.mask for sample in found.samples):
        found.problems.append(f'no image in {folder.root} has an object')
    if any(sample.split for sample in found.samples):
        for split in ('train', 'val'):
            if split in folder.declared_splits and not found.of(split) and not found.problems:
                place = folder.declared_splits[split]
                found.problems.append(f'the split {split} is empty: {place} has no image with labels')
        if outside := [sample.file for sample in found.samples if not sample.split]:
            found.notes['in no split, so left out'] += outside
            found.samples = [sample for sample in found.samples if sample.split]
    for sample in found.samples:
        if not sample.objects and not sample.mask:
            found.notes['no label file' if sample.labels == sample.file else 'no object in it'].append(sample.file)


def _by(size: tuple[int, int]) -> str:
    return f'{size[0]} x {size[1]}'
