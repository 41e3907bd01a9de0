"""COCO annotation files: facts read from them, parts of them."""

from __future__ import annotations

import json
from collections import defaultdict


def coco_classes(ann_file: str) -> tuple[str, ...]:
    """Names of the categories in a COCO annotation file, in the order of their ids (the order of the labels).

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If it is not a COCO annotation file.
    """
    with open(ann_file, encoding='utf-8') as file:
        try:
            categories = json.load(file)['categories']
            return tuple(one['name'] for one in sorted(categories, key=lambda one: one['id']))
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f'{ann_file} is not a COCO annotation file ({type(error).__name__}: {error})') from error


def subset(coco: dict, images: int, max_objects: int) -> dict:
    """The annotation dict with the chosen images and their annotations only."""
    objects = defaultdict(list)
    for annotation in coco['annotations']:
        objects[annotation['image_id']].append(annotation)
    fits = [
        image
        for image in sorted(coco['images'], key=lambda image: image['id'])
        if 1 <= len(objects[image['id']]) <= max_objects and not any(a.get('iscrowd') for a in objects[image['id']])
    ][:images]
    if len(fits) < images:
        raise ValueError(f'only {len(fits)} images have 1 to {max_objects} annotations, {images} asked for')
    return dict(coco, images=fits, annotations=[a for image in fits for a in objects[image['id']]])
