"""Objects of COCO, Pascal VOC and YOLO label files; every error names the file."""

from __future__ import annotations

import json
from pathlib import PurePosixPath
from typing import Any
from xml.etree import ElementTree

import yaml
from PIL import Image

from bnet_mm.datasets.custom.folder import Folder, Found, Labelled, split_of
from bnet_mm.datasets.readers import read_lines

NAME_FILES = ('classes.txt', 'obj.names', '_darknet.labels')
BOXES_ONLY, POLYGON = 4, 6  # numbers in a line of YOLO: a box; the shortest polygon


def annotation_files(folder: Folder) -> dict[str, dict[str, Any]]:
    """The COCO annotation files and their contents."""
    found = {}
    for file in folder.ending('.json'):
        try:
            content = json.loads((folder.root / file).read_text(encoding='utf-8'))
        except ValueError:  # no JSON, or no text
            continue
        if isinstance(content, dict) and {'images', 'annotations', 'categories'} <= set(content):
            found[file] = content
    return found


def read_coco(folder: Folder) -> Found:
    """Annotation files of COCO's form; keypoints beside instances are left out."""
    found = Found('coco')
    files = annotation_files(folder)
    if len(files) > 1 and (instances := {file: files[file] for file in files if 'instances' in file}):
        files = instances
    by_split: dict[str | None, str] = {}
    for file, content in files.items():
        split = split_of(file)
        if (first := by_split.setdefault(split, file)) != file:
            found.problems.append(f'{first} and {file} are both for {split or "all images"}: keep one of them')
            continue
        try:
            _read_coco_file(folder, found, file, content, split)
        except KeyError as error:
            found.problems.append(f'{file} cannot be read as COCO: an entry has no {error}')
        except (AttributeError, TypeError, ValueError) as error:
            found.problems.append(f'{file} cannot be read as COCO: {error}')
    return found


def _read_coco_file(folder: Folder, found: Found, file: str, content: dict[str, Any], split: str | None) -> None:
    names = {one['id']: _class_name(found, one['name'], file) for one in content['categories']}
    found.classes += [name for _, name in sorted(names.items()) if name not in found.classes]
    samples: dict[Any, Labelled] = {}
    for one in content['images']:
        image = folder.image(one['file_name'], split)
        if image is None:
            found.problems.append(f'{one["file_name"]}, listed in {file}, does not exist in {folder.root}')
            image = ''
        size = (one['width'], one['height']) if one.get('width') and one.get('height') else None
        samples[one['id']] = Labelled(image, file, size, split=split or folder.split(image))
    if not samples:
        found.problems.append(f'{file} lists no image')
    for one in content['annotations']:
        if one['image_id'] not in samples or one['category_id'] not in names:
            found.problems.append(f'annotation {one["id"]} in {file} has an image_id or category_id that is not in it')
            continue
        if len(one['bbox']) != 4:
            raise ValueError(f'the bbox of annotation {one["id"]} has {len(one["bbox"])} numbers')
        kept = {key: one[key] for key in ('bbox', 'area', 'segmentation', 'iscrowd') if one.get(key)}
        samples[one['image_id']].objects.append(dict(kept, category=names[one['category_id']]))
    if any(one['id'] == 0 for one in content['annotations']):
        found.notes['annotation ids start at 0, which pycocotools takes for no match: numbered anew from 1'].append(
            file
        )
    found.samples += [sample for sample in samples.values() if sample.file]


def _class_name(found: Found, name: str, file: str) -> str:
    """The name without spaces around it: 'dog ' and 'dog' are one class."""
    if (stripped := str(name).strip()) != name:
        found.notes[f'class {name!r} has spaces around its name, {stripped!r} is meant'].append(file)
    return stripped


def read_voc(folder: Folder) -> Found:
    """XML files with <annotation>, one an image; classes in the order of their names."""
    found = Found('voc')
    for file in folder.ending('.xml'):
        try:
            _read_voc_file(folder, found, file)
        except (ElementTree.ParseError, TypeError, ValueError) as error:
            found.problems.append(f'{file} cannot be read as VOC: {error}')
    found.classes = sorted({one['category'] for sample in found.samples for one in sample.objects})
    return found


def _read_voc_file(folder: Folder, found: Found, file: str) -> None:
    root = ElementTree.parse(folder.root / file).getroot()
    split = folder.split(file)
    stem = PurePosixPath(file).stem
    names = [root.findtext('filename') or '', *(f'{stem}{suffix}' for suffix in _suffixes(folder))]
    image = next(filter(None, (folder.image(name, split) for name in names if PurePosixPath(name).stem == stem)), None)
    if image is None:
        found.problems.append(f'{file} has no image: there is no {stem}.jpg or the like in {folder.root}')
        return
    width, height = (int(float(root.findtext(f'size/{side}') or 0)) for side in ('width', 'height'))
    sample = Labelled(image, file, (width, height) if width and height else None, split=split or folder.split(image))
    for one in root.iter('object'):
        name = _class_name(found, one.findtext('name') or '', file)
        sides = [one.findtext(f'bndbox/{side}') for side in ('xmin', 'ymin', 'xmax', 'ymax')]
        if not name or None in sides:
            raise ValueError('an object without name or bndbox')
        # VOC counts pixels from 1; as mmdet's XMLDataset reads it. Labelling tools that count from 0 are a pixel off.
        left, top, right, bottom = (float(side or 0) - 1 for side in sides)
        sample.objects.append(
            dict(category=name, bbox=[max(left, 0), max(top, 0), right - max(left, 0), bottom - max(top, 0)])
        )
    found.samples.append(sample)


def _suffixes(folder: Folder) -> set[str]:
    return {PurePosixPath(file).suffix for file in folder.images}


def yolo_labels(image: str) -> list[str]:
    """Where the labels of an image may be: beside it, or in ``labels`` in the place of ``images``."""
    path = PurePosixPath(image).with_suffix('.txt')
    places = [path]
    if 'images' in path.parts:
        last = len(path.parts) - 1 - path.parts[::-1].index('images')
        places.append(PurePosixPath(*path.parts[:last], 'labels', *path.parts[last + 1 :]))
    return [place.as_posix() for place in places]


def read_yolo(folder: Folder) -> Found:
    """A text file of ``class x y width height`` or ``class x y x y ...``, shares of the size, for each image."""
    found = Found('yolo')
    names_file, found.classes = _yolo_names(folder, found)
    files = set(folder.files)
    known: set[str] = set()
    for image in folder.images:
        labels = next((file for file in yolo_labels(image) if file in files), None)
        sample = Labelled(image, labels or image, split=folder.split(image))
        found.samples.append(sample)
        if labels is None:
            continue
        known.add(labels)
        try:
            with Image.open(folder.root / image) as picture:
                size = picture.size if picture.getexif().get(274, 1) < 5 else picture.size[::-1]
        except OSError:
            continue  # checks.py says what is wrong with it
        for number, line in enumerate(read_lines(folder.root / labels), 1):
            try:
                if line.strip():
                    sample.objects.append(_yolo_object(line, size, found.classes, names_file))
            except ValueError as error:
                found.problems.append(f'{labels}, line {number}: {error}')
    for file in folder.ending('.txt'):
        if 'labels' in PurePosixPath(file).parts[:-1] and file not in known:
            found.problems.append(f'{file} has no image: there is no {PurePosixPath(file).stem}.jpg or the like')
    return found


def _yolo_names(folder: Folder, found: Found) -> tuple[str, list[str]]:
    """The file that names the classes, and their names."""
    for file in folder.ending(('.yaml', '.yml')):
        try:
            content = yaml.safe_load((folder.root / file).read_text(encoding='utf-8'))
        except (ValueError, yaml.YAMLError) as error:
            found.problems.append(f'{file} cannot be read as YAML: {" ".join(str(error).split())}')
            return file, []
        names = content.get('names') if isinstance(content, dict) else None
        if names:
            ordered = [names[key] for key in sorted(names, key=int)] if isinstance(names, dict) else names
            return file, [_class_name(found, str(name), file) for name in ordered]
    for file in folder.files:
        if PurePosixPath(file).name in NAME_FILES:
            return file, [_class_name(found, line, file) for line in read_lines(folder.root / file) if line.strip()]
    found.problems.append(
        f'no file in {folder.root} names the classes: YOLO has them in data.yaml (names) or classes.txt'
    )
    return '', []


def _yolo_object(line: str, size: tuple[int, int], classes: list[str], names_file: str) -> dict[str, Any]:
    first, *rest = line.split()
    label, numbers = int(float(first)), [float(word) for word in rest]
    if classes and not 0 <= label < len(classes):
        raise ValueError(f'class {label}, but {names_file} names {len(classes)}, counted from 0')
    if len(numbers) == BOXES_ONLY + 1:
        raise ValueError('six numbers are a detection with its score, not a label')
    if len(numbers) != BOXES_ONLY and (len(numbers) < POLYGON or len(numbers) % 2):
        raise ValueError(f'a class and {len(numbers)} numbers are neither a box nor a polygon')
    if max(numbers) > 2:
        raise ValueError(f'{max(numbers):g} is no share of the size: YOLO has no pixels')
    width, height = size
    pixels = [number * (height if i % 2 else width) for i, number in enumerate(numbers)]
    name = classes[label] if classes else str(label)
    if len(numbers) > BOXES_ONLY:
        left, top, right, bottom = min(pixels[::2]), min(pixels[1::2]), max(pixels[::2]), max(pixels[1::2])
        return dict(category=name, bbox=[left, top, right - left, bottom - top], segmentation=[pixels])
    x, y, wide, high = pixels
    return dict(category=name, bbox=[x - wide / 2, y - high / 2, wide, high])
