"""Small seeded data sets in real layouts, of shapes on textured backgrounds, so that small models can learn them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Union

import cv2
import numpy as np

CLASSES = ('circle', 'square', 'triangle')
Labels = Union[Sequence[int], np.ndarray]


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


def draw_shapes(
    rng: np.random.Generator, size: int, labels: Labels, margin: float = 0.7
) -> tuple[np.ndarray, np.ndarray]:
    """An image (size, size, 3), and which shape each pixel shows (size, size), from 1; 0 for the background.

    Args:
        margin: How far from the border a shape's centre is at least, in its radii; with 0 half of it may be cut off.
    """
    image = textured_background(rng, size)
    owner = np.zeros((size, size), np.uint8)
    for number, label in enumerate(labels, 1):
        radius = rng.uniform(size * 0.1, size * 0.24)
        centre = rng.uniform(radius * margin, size - radius * margin, 2)
        draw_shape(rng, image, owner, number, outline(rng, CLASSES[label], radius) + centre)
    return image, owner


def draw_shape(rng: np.random.Generator, image: np.ndarray, owner: np.ndarray, number: int, points: np.ndarray) -> None:
    """Fill the polygon ``points`` (P, 2) with a texture, in place; it hides what was there."""
    size = len(image)
    shade = textured_background(rng, size) * 0.2 + rng.uniform(0, 255, 3) * 0.8
    area = np.zeros((size, size), np.uint8)
    cv2.fillPoly(area, [points.round().astype(np.int32)], 1)
    image[area == 1] = shade[area == 1].astype(np.uint8)
    owner[area == 1] = number


def random_labels(rng: np.random.Generator, least: int = 2, most: int = 4) -> np.ndarray:
    """Classes of ``least`` to ``most`` shapes."""
    return rng.integers(0, len(CLASSES), rng.integers(least, most + 1))


def run_lengths(mask: np.ndarray) -> dict:
    """COCO's uncompressed run lengths of a mask (H, W), column by column, starting with zeros."""
    flat = np.concatenate([[0], mask.T.reshape(-1), [0]])
    changes = np.flatnonzero(np.diff(flat))
    counts = np.diff(np.concatenate([[0], changes, [mask.size]]))
    return dict(counts=counts[: None if counts[-1] else -1].tolist(), size=list(mask.shape))


def coco_annotations(owner: np.ndarray, labels: Labels, crowd: bool) -> list[dict]:
    """What is visible of each shape; with ``crowd``, the last two as one crowd of the last one's class."""
    annotations = []
    single = len(labels) - 2 if crowd else len(labels)
    for number, label in enumerate(labels[:single], 1):
        if annotation := visible_annotation((owner == number).astype(np.uint8)):
            annotations.append(dict(annotation, category_id=int(label) + 1))
    mask = (owner > single).astype(np.uint8)
    if crowd and mask.any():
        box = [int(value) for value in cv2.boundingRect(mask)]
        region = dict(segmentation=run_lengths(mask), area=int(mask.sum()), bbox=box, iscrowd=1)
        annotations.append(dict(region, category_id=int(labels[-1]) + 1))
    return annotations


def write_coco(
    root: Path, counts: dict[str, int], size: int, seed: int, shapes: tuple[int, int] = (2, 4), margin: float = 0.7
) -> None:
    """Of sixteen images, one has a crowd and one nothing; the others have ``shapes``, least and most of them."""
    for split, count in counts.items():
        write_coco_split(root, split, count, size, split_generator(seed, split), shapes, margin)


def write_coco_occluded(root: Path, counts: dict[str, int], size: int, seed: int) -> None:
    """As :func:`write_coco`, with six to ten shapes an image, which cover each other, cut off by the border."""
    write_coco(root, counts, size, seed, shapes=(6, 10), margin=0.0)


def write_coco_split(
    root: Path, split: str, count: int, size: int, rng: np.random.Generator, shapes: tuple[int, int], margin: float
) -> None:
    folder = root / f'{split}2017'
    folder.mkdir(parents=True)
    images: list[dict] = []
    annotations: list[dict] = []
    for image_id in range(1, count + 1):
        labels: Labels = [] if image_id % 16 == 15 else random_labels(rng, *shapes)
        image, owner = draw_shapes(rng, size, labels, margin)
        found = coco_annotations(owner, labels, crowd=image_id % 16 == 7)
        name = f'{image_id:06d}.jpg'
        cv2.imwrite(str(folder / name), image)
        images.append(dict(id=image_id, file_name=name, height=size, width=size))
        annotations += [dict(one, image_id=image_id, id=len(annotations) + i) for i, one in enumerate(found, 1)]
    categories = [dict(id=i, name=name, supercategory='shape') for i, name in enumerate(CLASSES, 1)]
    path = root / 'annotations' / f'instances_{split}2017.json'
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(dict(images=images, annotations=annotations, categories=categories)))


def split_generator(seed: int, split: str) -> np.random.Generator:
    return np.random.default_rng(seed + (0 if split == 'train' else 1_000_000))


def class_map(owner: np.ndarray, labels: Labels, first: int) -> np.ndarray:
    """Class of each pixel (H, W): ``first`` and up for the shapes, 0 elsewhere, 255 on the outlines of the shapes."""
    classes = np.concatenate([[0], np.asarray(labels, int) + first]).astype(np.uint8)[owner]
    border = cv2.morphologyEx(owner, cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8)) > 0
    return np.where(border, 255, classes).astype(np.uint8)


def write_cityscapes(root: Path, counts: dict[str, int], size: int, seed: int) -> None:
    """Train ids: background 0 (road), shapes 11 to 13 (person, rider, car), 255 ignored."""
    for split, count in counts.items():
        rng, city = split_generator(seed, split), dict(train='aachen', val='frankfurt')[split]
        for number in range(count):
            labels = random_labels(rng)
            image, owner = draw_shapes(rng, size, labels)
            stem = f'{city}_{number:06d}_000019'
            write_image(root / 'leftImg8bit' / split / city / f'{stem}_leftImg8bit.png', image)
            labels = class_map(owner, labels, first=11)
            write_image(root / 'gtFine' / split / city / f'{stem}_gtFine_labelTrainIds.png', labels)


def write_voc(root: Path, counts: dict[str, int], size: int, seed: int) -> None:
    """Shapes are classes 1 to 3. A third of the training images is in train.txt, the others are the augmentation."""
    voc = root / 'VOCdevkit' / 'VOC2012'
    names: dict[str, list[str]] = dict(train=[], aug=[], val=[])
    for split, count in counts.items():
        rng = split_generator(seed, split)
        for number in range(count):
            labels = random_labels(rng)
            image, owner = draw_shapes(rng, size, labels)
            part = 'aug' if split == 'train' and number % 3 else split
            names[part].append(f'{dict(train=2007, val=2011)[split]}_{number:06d}')
            write_image(voc / 'JPEGImages' / f'{names[part][-1]}.jpg', image)
            folder = 'SegmentationClassAug' if part == 'aug' else 'SegmentationClass'
            write_image(voc / folder / f'{names[part][-1]}.png', class_map(owner, labels, first=1))
    for part, lines in names.items():
        write_lines(voc / 'ImageSets' / 'Segmentation' / f'{part}.txt', lines)


def write_ucf101(root: Path, counts: dict[str, int], size: int, seed: int) -> None:
    """The class is the shape; 16 frames of it moving. Groups 1 to 7 are the test split, as in the original."""
    videos: dict[str, list[tuple[str, int]]] = {}
    for split, count in counts.items():
        rng, videos[split] = split_generator(seed, split), []
        for number in range(count):
            label = number % len(CLASSES)
            name, clip = CLASSES[label].capitalize(), number // len(CLASSES)
            group = clip % 7 + 1 if split == 'val' else clip % 18 + 8
            path = f'{name}/v_{name}_g{group:02d}_c{clip // (7 if split == "val" else 18) + 1:02d}.avi'
            write_video(rng, root / 'videos' / path, size, label)
            videos[split].append((path, label))
    lists = root / 'ucfTrainTestlist'
    write_lines(lists / 'classInd.txt', [f'{i} {name.capitalize()}' for i, name in enumerate(CLASSES, 1)])
    write_lines(lists / 'trainlist01.txt', [f'{path} {label + 1}' for path, label in videos['train']])
    write_lines(lists / 'testlist01.txt', [path for path, _ in videos['val']])
    for split, lines in videos.items():
        write_lines(root / f'ucf101_{split}_split_1_videos.txt', [f'{path} {label}' for path, label in lines])


def write_video(rng: np.random.Generator, path: Path, size: int, label: int) -> None:
    """Sixteen frames of size x size: one shape crosses a still background."""
    path.parent.mkdir(parents=True, exist_ok=True)
    background, shape = textured_background(rng, size), outline(rng, CLASSES[label], rng.uniform(0.15, 0.25) * size)
    start, end, colour = *rng.uniform(0.25 * size, 0.75 * size, (2, 2)), rng.uniform(0, 255, 3)
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*'XVID'), 8, (size, size))
    if not writer.isOpened():
        raise OSError('this OpenCV cannot write XVID videos')
    for time in np.linspace(0, 1, 16):
        points = shape + start + time * (end - start)
        writer.write(cv2.fillPoly(background.copy(), [points.round().astype(np.int32)], colour.tolist()))
    writer.release()


def write_imagenet(root: Path, counts: dict[str, int], size: int, seed: int) -> None:
    """The class is the shape; the lists in meta/ name file and label."""
    for split, count in counts.items():
        rng, lines = split_generator(seed, split), []
        for number in range(count):
            label = number % len(CLASSES)
            image, owner = textured_background(rng, size), np.zeros((size, size), np.uint8)
            centre = size / 2 + rng.uniform(-0.15, 0.15, 2) * size
            draw_shape(rng, image, owner, 1, outline(rng, CLASSES[label], rng.uniform(0.2, 0.4) * size) + centre)
            wnid = f'n{label:08d}'
            name = f'{wnid}/{wnid if split == "train" else "ILSVRC2012_val"}_{number:08d}.JPEG'
            write_image(root / split / name, image, '.jpg')
            lines.append(f'{name} {label}')
        write_lines(root / 'meta' / f'{split}.txt', lines)


def write_image(path: Path, image: np.ndarray, encoding: str | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(cv2.imencode(encoding or path.suffix, image)[1].tobytes())


def write_lines(path: Path, lines: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(''.join(f'{line}\n' for line in lines))


LAYOUTS = dict(
    coco=write_coco, coco_occluded=write_coco_occluded, cityscapes=write_cityscapes, voc=write_voc,
    ucf101=write_ucf101, imagenet=write_imagenet,
)  # fmt: skip
