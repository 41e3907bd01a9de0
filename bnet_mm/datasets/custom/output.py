"""What is written beside the new config: COCO annotation files, or masks with lists."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bnet_mm.cli import UserError
from bnet_mm.datasets.custom.folder import SPLITS, Folder, Found, Labelled
from bnet_mm.datasets.custom.masks import values_of
from bnet_mm.datasets.toy import write_image, write_lines

VAL_SHARE = 0.2
SEED = 0


def fill_in_splits(found: Found) -> None:
    """Give every sample a split, where there is none a seeded one; what was done becomes a note.

    Raises:
        UserError: If a single image should be split.
    """
    if not found.of('train'):
        for sample in found.samples:
            sample.split = 'train' if sample.split is None else sample.split
    if not found.of('val'):
        if test := found.of('test'):
            for sample in test:
                sample.split = 'val'
            found.notes['there is no val, so test is used for it'] += [sample.file for sample in test]
        else:
            _split_off(found)
    trained = {one['category'] for sample in found.of('train') for one in sample.objects}
    if trained and (unseen := [name for name in found.classes if name not in trained]):
        found.notes['classes without an object in train'] += unseen


def _split_off(found: Found) -> None:
    samples = found.of('train')
    count = max(1, round(len(samples) * VAL_SHARE))
    if count >= len(samples):
        raise UserError(f'{samples[0].file} is the only image, and training and validation need one each')
    chosen = sorted(np.random.default_rng(SEED).permutation(len(samples))[:count].tolist())
    for i in chosen:
        samples[i].split = 'val'
    found.notes[f'there is no val, so {count} of {len(samples)} images are split off for it (seed {SEED})'] += [
        samples[i].file for i in chosen
    ]


def coco_dict(samples: Sequence[Labelled], classes: Sequence[str]) -> dict[str, Any]:
    """COCO annotations, with ids from 1; areas are those of the masks where there are any."""
    ids = {name: number for number, name in enumerate(classes, 1)}
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id, sample in enumerate(samples, 1):
        width, height = sample.size or (0, 0)
        images.append(dict(id=image_id, file_name=sample.file, width=width, height=height))
        for one in sample.objects:
            entry = dict(one, id=len(annotations) + 1, image_id=image_id, category_id=ids[one['category']])
            del entry['category']
            entry.setdefault('iscrowd', 0)
            if 'area' not in entry:
                entry['area'] = _area(one, height, width)
            annotations.append(entry)
    categories = [dict(id=number, name=name, supercategory='') for name, number in ids.items()]
    return dict(images=images, annotations=annotations, categories=categories)


def _area(one: dict[str, Any], height: int, width: int) -> float:
    if not isinstance(one.get('segmentation'), list):
        return one['bbox'][2] * one['bbox'][3]
    from pycocotools import mask

    return float(mask.area(mask.merge(mask.frPyObjects(one['segmentation'], height, width))))


def write(folder: Folder, found: Found, class_of: dict[int, int], target: Path) -> None:
    """The files of each split: ``train.json``; or ``train.txt`` and ``masks/<image>.png``, for masks."""
    target.mkdir()
    for split in SPLITS:
        samples = found.of(split)
        if not samples:
            continue
        if found.format != 'masks':
            (target / f'{split}.json').write_text(json.dumps(coco_dict(samples, found.classes)))
            continue
        write_lines(target / f'{split}.txt', [sample.file for sample in samples])
        for sample in samples:
            values, inverse = np.unique(values_of(folder.root / str(sample.mask)), return_inverse=True)
            classes = np.array([class_of[value] for value in values.tolist()], np.uint8)
            shape = (sample.size or (0, 0))[::-1]
            write_image(target / 'masks' / f'{sample.file}.png', classes[inverse].reshape(shape))
