"""Facts read from a COCO annotation file."""

from __future__ import annotations

import json


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
