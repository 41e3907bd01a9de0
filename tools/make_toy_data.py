"""Write a small seeded data set in a real layout: python tools/make_toy_data.py coco OUT [--train N] [--val N].

coco: shapes on textured backgrounds, overlapping each other, as COCO instances (polygons, areas, boxes of what is
visible), in train2017/, val2017/ and annotations/instances_{train,val}2017.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from pathlib import Path

import cv2
import numpy as np

CLASSES = ('circle', 'square', 'triangle')


def textured_background(rng: np.random.Generator, size: int) -> np.ndarray:
    """(size, size, 3) uint8: smooth colour noise with stripes, so that neither colour nor edges alone mark a shape."""
    noise = cv2.resize(rng.uniform(0, 255, (rng.integers(3, 9), rng.integers(3, 9), 3)), (size, size))
    y, x = np.mgrid[:size, :size]
    angle, period = rng.uniform(0, np.pi), rng.uniform(6, 30)
    stripes = np.sin((x * np.cos(angle) + y * np.sin(angle)) * 2 * np.pi / period)[..., None] * rng.uniform(5, 25, 3)
    return np.clip(noise * 0.5 + 60 + stripes + rng.normal(0, 8, (size, size, 3)), 0, 255).astype(np.uint8)


def outline(rng: np.random.Generator, name: str, radius: float) -> np.ndarray:
    """(P, 2) corner points around the origin, randomly turned and stretched."""
    corners = {'circle': 40, 'square': 4, 'triangle': 3}[name]
    angles = rng.uniform(0, 2 * np.pi) + np.arange(corners) * 2 * np.pi / corners
    return radius * np.stack([np.cos(angles), np.sin(angles)], 1) * rng.uniform(0.85, 1.15, (1, 2))


def visible_annotation(mask: np.ndarray) -> dict | None:
    """COCO segmentation, area and box of a mask (H, W) of 0 and 1; None if too little is visible."""
    contours, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    polygons = [c.reshape(-1).tolist() for c in contours if len(c) >= 3 and cv2.contourArea(c) >= 16]
    if not polygons or mask.sum() < 80:
        return None
    x, y, w, h = cv2.boundingRect(mask)
    return dict(segmentation=polygons, area=int(mask.sum()), bbox=[x, y, w, h], iscrowd=0)


def draw_image(rng: np.random.Generator, size: int) -> tuple[np.ndarray, list[dict]]:
    """One image (size, size, 3) and its annotations; later shapes hide parts of earlier ones."""
    image = textured_background(rng, size)
    owner = np.zeros((size, size), np.uint8)  # which shape a pixel shows, 0 for the background
    labels = rng.integers(0, len(CLASSES), rng.integers(2, 5))
    for number, label in enumerate(labels, 1):
        radius = rng.uniform(size * 0.1, size * 0.24)
        points = outline(rng, CLASSES[label], radius) + rng.uniform(radius * 0.7, size - radius * 0.7, 2)
        points = points.round().astype(np.int32)
        shade = textured_background(rng, size) * 0.2 + rng.uniform(0, 255, 3) * 0.8
        area = np.zeros((size, size), np.uint8)
        cv2.fillPoly(area, [points], 1)
        image[area == 1] = shade[area == 1].astype(np.uint8)
        owner[area == 1] = number
    annotations = []
    for number, label in enumerate(labels, 1):
        if annotation := visible_annotation((owner == number).astype(np.uint8)):
            annotations.append(dict(annotation, category_id=int(label) + 1))
    return image, annotations


def write_split(root: Path, split: str, count: int, size: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    folder = root / f'{split}2017'
    folder.mkdir(parents=True)
    images, annotations = [], []
    for image_id in range(1, count + 1):
        image, found = draw_image(rng, size)
        name = f'{image_id:06d}.jpg'
        cv2.imwrite(str(folder / name), image)
        images.append(dict(id=image_id, file_name=name, height=size, width=size))
        annotations += [dict(one, image_id=image_id, id=len(annotations) + i) for i, one in enumerate(found, 1)]
    categories = [dict(id=i, name=name, supercategory='shape') for i, name in enumerate(CLASSES, 1)]
    path = root / 'annotations' / f'instances_{split}2017.json'
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(dict(images=images, annotations=annotations, categories=categories)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('layout', choices=['coco'])
    parser.add_argument('out', type=Path, help='folder to make')
    parser.add_argument('--train', type=int, default=400, help='training images')
    parser.add_argument('--val', type=int, default=100, help='validation images')
    parser.add_argument('--size', type=int, default=192, help='height and width in pixels')
    parser.add_argument('--seed', type=int, default=0)
    args = parser.parse_args()
    if args.out.exists():
        sys.exit(f'error: {args.out} exists already; remove it or name another folder')
    temporary = args.out.with_name(f'{args.out.name}.part{os.getpid()}')
    try:
        write_split(temporary, 'train', args.train, args.size, args.seed)
        write_split(temporary, 'val', args.val, args.size, args.seed + 1_000_000)
        temporary.rename(args.out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(f'{args.out}: {args.train} training and {args.val} validation images of {", ".join(CLASSES)}')


if __name__ == '__main__':
    main()
