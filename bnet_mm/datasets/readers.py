"""The files that a data set has, read as the hosts read them, and a look at single ones."""

from __future__ import annotations

import contextlib
import io
import os
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import cv2
import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from pycocotools.coco import COCO

IMAGES = ('.jpg', '.jpeg', '.png', '.ppm', '.bmp', '.pgm', '.tif')  # mmpretrain's
PICTURES = (*IMAGES, '.tiff', '.webp')  # what a user may have


class Sample(NamedTuple):
    """An image or video and what is known of it; paths are relative to the root."""

    file: str
    label: int | None = None
    mask: str | None = None
    coco: COCO | None = None
    coco_id: int | None = None


def list_files(root: Path, folder: str, suffix: str | tuple[str, ...]) -> list[str]:
    """Files below a folder with this end of their names, relative to the root; without hidden ones, as in mmengine."""
    if not (root / folder).is_dir():
        raise FileNotFoundError(None, 'no such folder', str(root / folder))
    return sorted(
        f'{os.path.relpath(where, root)}/{name}'
        for where, _, names in os.walk(root / folder, followlinks=True)
        for name in names
        if name.lower().endswith(suffix) and not name.startswith('.')
    )


def coco_file(folder: str, annotations: str, root: Path) -> list[Sample]:
    from pycocotools.coco import COCO

    try:
        with contextlib.redirect_stdout(io.StringIO()):
            coco = COCO(str(root / annotations))
        for objects in coco.imgToAnns.values():
            for one in objects:
                if one['category_id'] not in coco.cats or one['image_id'] not in coco.imgs:
                    raise ValueError(f'annotation {one["id"]} has an image_id or category_id that is not in the file')
        return [Sample(f'{folder}/{one["file_name"]}', coco=coco, coco_id=number) for number, one in coco.imgs.items()]
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
        raise ValueError(f'{root / annotations} is no COCO annotation file: {type(error).__name__} {error}') from error


def read_lines(path: Path) -> list[str]:
    try:
        return path.read_text().split('\n')
    except UnicodeDecodeError as error:
        raise ValueError(f'{path} is no text: {error}') from error


def cityscapes_part(part: str, root: Path) -> list[Sample]:
    """Images and masks of the same stem; a stem that only one of them has is a sample too, to be found missing."""
    image, mask = f'leftImg8bit/{part}/{{}}_leftImg8bit.png', f'gtFine/{part}/{{}}_gtFine_labelTrainIds.png'
    stems = set()
    for path in (image, mask):
        folder, suffix = path.split('/{}')
        files = list_files(root, folder, suffix.lower())
        stems |= {file[len(folder) + 1 : -len(suffix)] for file in files}
    return [Sample(image.format(stem), mask=mask.format(stem)) for stem in sorted(stems)]


def voc_part(part: str, masks: str, root: Path) -> list[Sample]:
    stems = [line.strip() for line in read_lines(root / f'VOC2012/ImageSets/Segmentation/{part}.txt') if line.strip()]
    return [Sample(f'VOC2012/JPEGImages/{stem}.jpg', mask=f'VOC2012/{masks}/{stem}.png') for stem in stems]


def labelled_list(names: str, folder: str, root: Path) -> list[Sample]:
    """Lines of file and label."""
    samples = []
    for line in filter(None, map(str.strip, read_lines(root / names))):
        file, _, label = line.rpartition(' ')
        if not file or not label.isdecimal():
            raise ValueError(f'{root / names}: not a file and a label: {line!r}')
        samples.append(Sample(f'{folder}/{file}', int(label)))
    return samples


def class_folders(part: str, root: Path) -> list[Sample]:
    """A folder per class, numbered in the order of their names."""
    files = [file for file in list_files(root, part, IMAGES) if file.count('/') > 1]
    labels = {name: label for label, name in enumerate(sorted({file.split('/')[1] for file in files}))}
    return [Sample(file, labels[file.split('/')[1]]) for file in files]


def imagenet_part(part: str, root: Path) -> list[Sample]:
    """As mmpretrain's ImageNet reads it: the list in meta/ if there is one, the class folders otherwise."""
    if (root / f'meta/{part}.txt').exists():
        return labelled_list(f'meta/{part}.txt', part, root)
    return class_folders(part, root)


def pixels(path: Path) -> np.ndarray:
    """All pixels of an image, palette images as their indices."""
    try:
        with Image.open(path) as image:
            return np.asarray(image)
    except Exception as error:  # decoders raise whatever they like
        raise ValueError(f'{path} cannot be decoded: {error}') from error


def look_at_image(root: Path, sample: Sample, classes: int) -> None:
    pixels(root / sample.file)


def look_at_mask(root: Path, sample: Sample, classes: int) -> None:
    assert sample.mask is not None
    image, mask = pixels(root / sample.file), pixels(root / sample.mask)
    if mask.shape != image.shape[:2]:
        raise ValueError(f'{root / sample.mask} has the shape {mask.shape}, not {image.shape[:2]} as its image')
    if wrong := sorted(set(np.unique(mask).tolist()) - {*range(classes), 255}):
        raise ValueError(f'{root / sample.mask} has the labels {wrong}, beyond 0 to {classes - 1} and 255 (ignored)')


def look_at_objects(root: Path, sample: Sample, classes: int) -> None:
    """Size of the image, and every object's mask."""
    assert sample.coco is not None
    height, width = pixels(root / sample.file).shape[:2]
    listed = sample.coco.imgs[sample.coco_id]
    if (height, width) != (listed['height'], listed['width']):
        raise ValueError(
            f'{root / sample.file} is {width} x {height}, in the annotations {listed["width"]} x {listed["height"]}'
        )
    for one in sample.coco.imgToAnns[sample.coco_id]:
        try:
            sample.coco.annToMask(one)
        except Exception as error:  # pycocotools raises bare Exceptions
            raise ValueError(f'the segmentation of annotation {one["id"]}, {sample.file}: {error}') from error


def look_at_video(root: Path, sample: Sample, classes: int) -> None:
    """Three frames, with the decoder of the configs; not the last one, which OpenCV may miss in a sound file."""
    video = cv2.VideoCapture(str(root / sample.file))
    frames = max(0, int(video.get(cv2.CAP_PROP_FRAME_COUNT)))
    for position in (0, frames // 3, frames * 2 // 3):
        video.set(cv2.CAP_PROP_POS_FRAMES, position)
        if not video.read()[0]:
            raise ValueError(f'{root / sample.file} cannot be decoded at frame {position} of {frames}')
