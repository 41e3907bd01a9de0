"""Semantic masks beside images: which belongs to which, and the classes that their values stand for."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path, PurePosixPath

import numpy as np

from bnet_mm.datasets.custom.folder import Folder, Found, Labelled, split_of
from bnet_mm.datasets.readers import pixels, read_lines
from bnet_mm.messages import first_of

MASK_FOLDER = re.compile(r'mask|label|annot|ann_dir|segmentationclass|(?<![a-z])(seg|gt)(?![a-z])')
MASK_END = re.compile(r'_(mask|masks|seg|label|labels|gt)$')
NAME_FILES = ('labelmap.txt', 'classes.txt', 'labels.txt')
LABELMAP = re.compile(r'(.+?):(\d+),(\d+),(\d+)')  # name:red,green,blue, as CVAT writes it
IGNORED = 255
COLOUR = 1 << 24  # so that no colour has the value of another mask's number
MOST = 255  # classes that fit beside IGNORED


def mask_pairs(folder: Folder) -> dict[str, list[str]]:
    """Image -> its masks, of which there should be one: the same stem in a folder that is called masks or the like."""
    masks = {file for file in folder.images if MASK_FOLDER.search(str(PurePosixPath(file).parent).lower())}
    by_stem = defaultdict(list)
    for file in sorted(masks):
        by_stem[MASK_END.sub('', PurePosixPath(file).stem)].append(file)
    pairs = {}
    for image in (file for file in folder.images if file not in masks and 'SegmentationObject' not in file):
        fits = by_stem[PurePosixPath(image).stem]
        same = [file for file in fits if split_of(file) == split_of(image)]
        pairs[image] = same or fits
    return pairs


def read_masks(folder: Folder) -> Found:
    """Images with masks; their values are looked at by :func:`number_classes`."""
    found = Found('masks')
    for image, masks in mask_pairs(folder).items():
        if len(masks) > 1:
            found.problems.append(f'{image} has several masks: {first_of(masks)}')
        elif not masks:
            found.notes['no mask, so left out'].append(image)
        elif masks[0].lower().endswith(('.jpg', '.jpeg')):
            found.problems.append(f'{masks[0]} is a mask in JPEG, which changes its values: save it as PNG')
        else:
            split = folder.split(image) or folder.split(masks[0])
            found.samples.append(Labelled(image, masks[0], mask=masks[0], split=split))
    return found


def values_of(path: Path) -> np.ndarray:
    """The value of each pixel (H, W); of a colour picture the three bytes as one number, and COLOUR.

    Raises:
        ValueError: If it cannot be decoded.
    """
    array = pixels(path)
    if array.ndim == 3 and array.shape[2] >= 3:
        return array[..., :3].astype(np.int64) @ np.array([1 << 16, 1 << 8, 1]) + COLOUR
    return (array if array.ndim == 2 else array[..., 0]).astype(np.int64)


def number_classes(folder: Folder, found: Found, values: set[int]) -> dict[int, int]:
    """Value in the masks -> class from 0, or 255 for what is ignored; the names go into ``found.classes``.

    The number 255 is ignored, as in Pascal VOC and Cityscapes, unless 0 and 255 are all there is. Names are those of
    classes.txt or labels.txt, a line each from class 0 on, or of labelmap.txt with their colours. Values that they do
    not account for are numbered in their order.
    """
    file, names, colours = _names(folder)
    used = sorted(values if values == {0, IGNORED} else values - {IGNORED})
    known = colours or [*range(len(names))]
    if not colours and not set(used) <= set(known):
        known = used
    found.classes = names or [f'class{i}' for i in range(len(known))]
    if not names:
        found.notes['names of the classes are missing: put them into classes.txt, a line each'] += [str(folder.root)]
    masks = first_of(sample.labels for sample in found.samples)
    if not used:
        found.problems.append(f'the masks have no value but 255, which is ignored: {masks}')
    elif len(used) > MOST:
        found.problems.append(f'the masks have {len(used)} different values, {MOST} classes at most: {masks}')
    elif unknown := [f'{value >> 16 & 255},{value >> 8 & 255},{value & 255}' for value in used if value not in known]:
        found.problems.append(f'{file} has no class with the colour {first_of(unknown)} of the masks')
    elif len(known) != len(found.classes):
        found.problems.append(f'{file} names {len(names)} classes, the masks have the values {first_of(used, 20)}')
    return {value: IGNORED for value in values} | {value: i for i, value in enumerate(known)}


def _names(folder: Folder) -> tuple[str, list[str], list[int]]:
    """The file that names the classes, the names, and their colours where it has them."""
    for file in folder.files:
        if PurePosixPath(file).name not in NAME_FILES:
            continue
        lines = [line.strip() for line in read_lines(folder.root / file) if line.strip() and not line.startswith('#')]
        matches = [match for match in map(LABELMAP.match, lines) if match]
        if len(matches) == len(lines):
            colours = [COLOUR + (int(match[2]) << 16) + (int(match[3]) << 8) + int(match[4]) for match in matches]
            return file, [match[1] for match in matches], colours
        return file, lines, []
    return '', [], []
