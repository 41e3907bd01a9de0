"""Write a COCO annotation file with a few images of another: python tools/coco_subset.py IN OUT --images 8

For overfitting trials, where training and evaluation must see the same few images. Takes the first images that have
between one and --max-objects annotations, none of them crowds.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import defaultdict
from pathlib import Path


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('source', metavar='IN', type=Path, help='COCO annotation file')
    parser.add_argument('target', metavar='OUT', type=Path, help='file to write')
    parser.add_argument('--images', type=int, default=8)
    parser.add_argument('--max-objects', type=int, default=6)
    args = parser.parse_args()
    if args.target.exists():
        sys.exit(f'error: {args.target} exists already')
    try:
        result = subset(json.loads(args.source.read_text()), args.images, args.max_objects)
        temporary = args.target.with_name(f'{args.target.name}.part')
        temporary.write_text(json.dumps(result))
        os.replace(temporary, args.target)
    except (OSError, ValueError, KeyError) as error:
        sys.exit(f'error: {args.source}: {error}')
    print(f'{args.target}: {len(result["images"])} images, {len(result["annotations"])} objects')


if __name__ == '__main__':
    main()
