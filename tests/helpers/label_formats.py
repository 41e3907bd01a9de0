"""COCO data as other people keep theirs: VOC's XML, YOLO's text, semantic masks. Written without the package."""

import json
import shutil
from xml.sax.saxutils import escape

import numpy as np
import yaml
from PIL import Image


def read_split(root, split):
    """The annotations of one split of COCO's layout, without crowds, which the other formats do not have."""
    coco = json.loads((root / f'annotations/instances_{split}2017.json').read_text())
    names = {one['id']: one['name'] for one in coco['categories']}
    images = {one['id']: dict(one, objects=[]) for one in coco['images']}
    for one in coco['annotations']:
        if not one.get('iscrowd'):
            images[one['image_id']]['objects'].append(dict(one, name=names[one['category_id']]))
    return list(images.values()), [names[key] for key in sorted(names)]


def copy_image(root, split, image, folder, name=''):
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(root / f'{split}2017' / image['file_name'], folder / name)


def write_voc(root, out, splits=('train', 'val')):
    """VOC's folders, the split in the names of the files; pixels count from 1."""
    for split in splits:
        images, _ = read_split(root, split)
        (out / 'Annotations').mkdir(parents=True, exist_ok=True)
        for image in images:
            stem = f'{split}_{image["file_name"].rpartition(".")[0]}'
            copy_image(root, split, image, out / 'JPEGImages', f'{stem}.jpg')
            lines = [f'<annotation><filename>{stem}.jpg</filename>']
            lines += [f'<size><width>{image["width"]}</width><height>{image["height"]}</height><depth>3</depth></size>']
            for one in image['objects']:
                x, y, w, h = one['bbox']
                sides = dict(xmin=x + 1, ymin=y + 1, xmax=x + w + 1, ymax=y + h + 1)
                box = ''.join(f'<{side}>{value}</{side}>' for side, value in sides.items())
                lines.append(f'<object><name>{escape(one["name"])}</name><bndbox>{box}</bndbox></object>')
            (out / 'Annotations' / f'{stem}.xml').write_text('\n'.join([*lines, '</annotation>']))
        (out / 'ImageSets/Main').mkdir(parents=True, exist_ok=True)
        stems = ''.join(f'{split}_{image["file_name"].rpartition(".")[0]}\n' for image in images)
        (out / f'ImageSets/Main/{split}.txt').write_text(stems)
    return out


def write_yolo(root, out, splits=('train', 'val'), polygons=False):
    """images/train, labels/train and so on, and data.yaml; an image without objects has no label file."""
    for split in splits:
        images, names = read_split(root, split)
        (out / 'labels' / split).mkdir(parents=True, exist_ok=True)
        for image in images:
            copy_image(root, split, image, out / 'images' / split)
            wide, high = image['width'], image['height']
            lines = []
            for one in image['objects']:
                x, y, w, h = one['bbox']
                shares = [(x + w / 2) / wide, (y + h / 2) / high, w / wide, h / high]
                if polygons:
                    shares = [value / (high if i % 2 else wide) for i, value in enumerate(one['segmentation'][0])]
                lines.append(' '.join([str(names.index(one['name'])), *(f'{value:.6f}' for value in shares)]))
            if lines:
                stem = image['file_name'].rpartition('.')[0]
                (out / 'labels' / split / f'{stem}.txt').write_text('\n'.join(lines))
    (out / 'data.yaml').write_text(yaml.safe_dump(dict(train='images/train', val='images/val', names=names)))
    return out


def write_masks(root, out, splits=('train', 'val')):
    """images/ and masks/, the split in the names of the files; boxes are filled with classes from 1, over 0."""
    for split in splits:
        images, names = read_split(root, split)
        for image in images:
            stem = f'{split}_{image["file_name"].rpartition(".")[0]}'
            copy_image(root, split, image, out / 'images', f'{stem}.jpg')
            mask = np.zeros((image['height'], image['width']), np.uint8)
            for one in image['objects']:
                x, y, w, h = (round(value) for value in one['bbox'])
                mask[y : y + h, x : x + w] = names.index(one['name']) + 1
            (out / 'masks').mkdir(exist_ok=True)
            Image.fromarray(mask).save(out / 'masks' / f'{stem}.png')
    (out / 'classes.txt').write_text('\n'.join(['background', *names]))
    return out
