"""Labels of every format, read from what tests/helpers/label_formats.py wrote of the same COCO data."""

import json
import shutil

import numpy as np
import pytest

from bnet_mm.cli import UserError
from bnet_mm.datasets.custom.checks import look
from bnet_mm.datasets.custom.folder import Folder, split_of
from bnet_mm.datasets.custom.formats import read
from bnet_mm.datasets.custom.output import coco_dict, fill_in_splits, write
from helpers.label_formats import read_split, write_masks, write_voc, write_yolo
from helpers.paths import SHARED_DATA

pytest.importorskip('pycocotools')
WRITE = dict(
    coco=shutil.copytree, voc=write_voc, yolo=write_yolo, polygons=lambda *args: write_yolo(*args, polygons=True)
)


def look_at(root, needed='boxes', name='auto'):
    folder = Folder(root)
    found = read(folder, name, needed)
    class_of = look(folder, found, list(found.samples))
    return folder, found, class_of


def boxes_by_image(images, key):
    """Name of the file, without its split -> rows of class and box."""
    return {
        image['file_name'].rpartition('/')[2].rpartition('_')[2]: [(one[key], *one['bbox']) for one in image['objects']]
        for image in images
    }


def as_images(coco):
    names = {one['id']: one['name'] for one in coco['categories']}
    images = {one['id']: dict(one, objects=[]) for one in coco['images']}
    for one in coco['annotations']:
        if not one['iscrowd']:
            images[one['image_id']]['objects'].append(dict(one, name=names[one['category_id']]))
    return list(images.values())


def check_boxes(root, out, form):
    """What is read of ``out`` is what stands in COCO's files in ``root``."""
    _, found, _ = look_at(WRITE[form](root, out))
    assert found.problems == [] and found.format == form.replace('polygons', 'yolo')
    for split in ('train', 'val'):
        images, names = read_split(root, split)
        if form == 'polygons':  # the box is that of the polygon that was written
            for one in (one for image in images for one in image['objects']):
                x, y = np.reshape(one['segmentation'][0], (-1, 2)).T
                one['bbox'] = [x.min(), y.min(), np.ptp(x), np.ptp(y)]
        coco = coco_dict(found.of(split), found.classes)
        expected, got = boxes_by_image(images, 'name'), boxes_by_image(as_images(coco), 'name')
        assert expected.keys() == got.keys() and any(expected.values())
        for file, rows in expected.items():
            assert [row[0] for row in got[file]] == [row[0] for row in rows]
            error = 2e-3 if found.format == 'yolo' else 1e-6  # six digits of a share of the size
            np.testing.assert_allclose([row[1:] for row in got[file]], [row[1:] for row in rows], atol=error)
        assert set(found.classes) <= set(names)
        assert min(one['id'] for one in coco['annotations']) == 1
    return found


@pytest.mark.parametrize('form', WRITE)
def test_boxes(toy_coco, tmp_path, form):
    check_boxes(toy_coco, tmp_path / 'out', form)


@pytest.mark.data
@pytest.mark.parametrize('form', ['voc', 'yolo'])
def test_boxes_of_real_images(tmp_path, form):
    found = check_boxes(SHARED_DATA / 'mini_coco', tmp_path / 'out', form)
    assert len(found.samples) == 200


@pytest.mark.parametrize('form', ['voc', 'yolo'])
def test_boxes_are_those_of_another_reader(toy_coco, tmp_path, form):
    globox = pytest.importorskip('globox')
    out = WRITE[form](toy_coco, tmp_path / 'out')
    _, found, _ = look_at(out)
    if form == 'voc':
        other = globox.AnnotationSet.from_pascal_voc(out / 'Annotations')
    else:
        other = globox.AnnotationSet.from_yolo_v5(out / 'labels/train', image_folder=out / 'images/train')
    shift = 1 if form == 'voc' else 0  # it does not count VOC's pixels from 1
    of_them = found.samples if form == 'voc' else found.of('train')
    samples = {sample.file.rpartition('/')[2]: sample for sample in of_them}
    assert len(other) > 10
    for annotation in other:
        rows = [(box.xmin - shift, box.ymin - shift, box.xmax - shift, box.ymax - shift) for box in annotation.boxes]
        own = [one['bbox'] for one in samples[annotation.image_id].objects]
        np.testing.assert_allclose([(x, y, x + w, y + h) for x, y, w, h in own], rows, atol=1e-3)


def test_voc_as_mmdet_reads_it(toy_coco, tmp_path):
    pytest.importorskip('mmdet')
    from mmdet.datasets import XMLDataset

    out = write_voc(toy_coco, tmp_path / 'out')
    for path in (out / 'Annotations').iterdir():  # mmdet rounds down
        path.write_text(path.read_text().replace('.0<', '<'))
    _, found, _ = look_at(out)
    theirs = XMLDataset(
        ann_file='ImageSets/Main/val.txt', data_root=str(out), data_prefix=dict(sub_data_root=''),
        img_subdir='JPEGImages', ann_subdir='Annotations', metainfo=dict(classes=found.classes),
        pipeline=[], test_mode=True,
    )  # fmt: skip
    ours = {sample.file.rpartition('/')[2]: sample.objects for sample in found.of('val')}
    assert len(theirs) == len(ours) == 5
    for i in range(len(theirs)):
        info = theirs.get_data_info(i)
        boxes = [one['bbox'] for one in ours[info['img_path'].rpartition('/')[2]]]
        assert [one['bbox'] for one in info['instances']] == [[x, y, x + w, y + h] for x, y, w, h in boxes]
        names = [found.classes[one['bbox_label']] for one in info['instances']]
        assert names == [one['category'] for one in ours[info['img_path'].rpartition('/')[2]]]


def test_areas_and_polygons(toy_coco, tmp_path):
    """A polygon's area is that of its mask, by pycocotools; a box's that of the box."""
    from pycocotools.coco import COCO

    folder, found, class_of = look_at(write_yolo(toy_coco, tmp_path / 'out', polygons=True), needed='objects')
    fill_in_splits(found)
    write(folder, found, class_of, tmp_path / 'data')
    coco = COCO(str(tmp_path / 'data/val.json'))
    assert len(coco.imgs) == 5 and len(coco.anns) > 5
    for one in coco.anns.values():
        assert one['area'] == coco.annToMask(one).sum()
    boxes = coco_dict(look_at(write_yolo(toy_coco, tmp_path / 'boxes'))[1].samples, found.classes)['annotations']
    assert all(one['area'] == pytest.approx(one['bbox'][2] * one['bbox'][3]) for one in boxes)


def test_crowds_and_areas_of_coco_stay(toy_coco):
    _, found, _ = look_at(toy_coco)
    original = json.loads((toy_coco / 'annotations/instances_train2017.json').read_text())['annotations']
    got = coco_dict(found.of('train'), found.classes)['annotations']
    key = ('area', 'iscrowd', 'segmentation', 'category_id')
    assert [[one[name] for name in key] for one in got] == [[one[name] for name in key] for one in original]
    assert any(one['iscrowd'] for one in got)


@pytest.mark.parametrize('path, split', [
    ('images/train2017/1.jpg', 'train'), ('annotations/instances_val2017.json', 'val'), ('valid/a.png', 'val'),
    ('Validation/a', 'val'), ('data_test/a', 'test'), ('train/val/a', 'val'), ('trainval', None), ('images/a', None),
    ('constraints/interval.png', None),
])  # fmt: skip
def test_split_of_a_name(path, split):
    assert split_of(path) == split


def test_splits_of_roboflow_and_darknet(toy_coco, tmp_path):
    """A folder for each split with its own annotations; a list of files beside a flat folder."""
    write_yolo(toy_coco, tmp_path / 'yolo')
    shutil.move(tmp_path / 'yolo/images/val', tmp_path / 'yolo/valid')
    for file in (tmp_path / 'yolo/labels/val').iterdir():
        shutil.move(file, tmp_path / 'yolo/valid')
    (tmp_path / 'yolo/labels/val').rmdir()
    _, found, _ = look_at(tmp_path / 'yolo')
    assert found.problems == [] and (len(found.of('train')), len(found.of('val'))) == (16, 5)
    flat = tmp_path / 'flat'
    shutil.copytree(tmp_path / 'yolo/valid', flat)
    (flat / 'classes.txt').write_text('circle\nsquare\ntriangle\n')
    (flat / 'val.txt').write_text('data/000002.jpg\n')
    (flat / 'train.txt').write_text('data/000001.jpg\ndata/000003.jpg\n')
    _, found, _ = look_at(flat)
    assert found.problems == [] and [sample.file for sample in found.of('val')] == ['000002.jpg']
    assert [sample.file for sample in found.samples] == ['000001.jpg', '000002.jpg', '000003.jpg']
    assert found.notes['in no split, so left out'] == ['000004.jpg', '000005.jpg']


def test_coco_of_roboflow_and_windows(toy_coco, tmp_path):
    """Annotations beside the images, the same names in both splits, a category 0 that nothing has, and backslashes."""
    for split, folder in (('train', 'train'), ('val', 'valid')):
        shutil.copytree(toy_coco / f'{split}2017', tmp_path / folder)
        coco = json.loads((toy_coco / f'annotations/instances_{split}2017.json').read_text())
        coco['categories'].insert(0, dict(id=0, name='shapes', supercategory='none'))
        for image in coco['images']:
            image['file_name'] = f'{folder}\\{image["file_name"]}'
        (tmp_path / folder / '_annotations.coco.json').write_text(json.dumps(coco))
    _, found, _ = look_at(tmp_path)
    assert found.problems == [] and found.classes == ['shapes', 'circle', 'square', 'triangle']
    assert [len(found.of(split)) for split in ('train', 'val')] == [16, 5]
    assert all(sample.file.startswith('valid/') for sample in found.of('val'))


def test_voc_of_labelimg(toy_coco, tmp_path):
    """Images of any suffix and XML files in one folder."""
    write_voc(toy_coco, tmp_path / 'voc', splits=['val'])
    shutil.copytree(tmp_path / 'voc/Annotations', tmp_path / 'flat')
    for image in (tmp_path / 'voc/JPEGImages').iterdir():
        shutil.copy(image, tmp_path / f'flat/{image.stem}.JPG')
    _, found, _ = look_at(tmp_path / 'flat')
    assert found.problems == [] and {sample.file for sample in found.samples} == {
        f'val_00000{i}.JPG' for i in range(1, 6)
    }


def test_seeded_split(toy_coco, tmp_path):
    splits = []
    for out in ('a', 'b'):
        write_yolo(toy_coco, tmp_path / out, splits=['train'])
        shutil.move(tmp_path / out / 'images/train', tmp_path / out / 'images/all')
        shutil.move(tmp_path / out / 'labels/train', tmp_path / out / 'labels/all')
        _, found, _ = look_at(tmp_path / out)
        fill_in_splits(found)
        splits.append([sample.split for sample in found.samples])
    assert splits[0] == splits[1] and sorted(splits[0]) == ['train'] * 13 + ['val'] * 3
    assert 'there is no val, so 3 of 16 images are split off for it (seed 0)' in found.sentences()[-1]


def test_masks(toy_coco, tmp_path):
    out = write_masks(toy_coco, tmp_path / 'out')
    folder, found, class_of = look_at(out, needed='masks')
    assert found.problems == [] and found.classes == ['background', 'circle', 'square', 'triangle']
    fill_in_splits(found)
    write(folder, found, class_of, tmp_path / 'data')
    from PIL import Image

    for split, count in (('train', 17), ('val', 4)):
        lines = (tmp_path / f'data/{split}.txt').read_text().splitlines()
        assert len(lines) == count
        for line in lines:
            mask = np.asarray(Image.open(tmp_path / 'data/masks' / f'{line}.png'))
            original = np.asarray(Image.open(out / 'masks' / line.replace('images/', '').replace('.jpg', '.png')))
            assert (mask == original).all()


@pytest.mark.parametrize('colours, text, classes, expected', [
    ([0, 255], None, ['class0', 'class1'], [0, 1]),  # a foreground
    ([0, 255], 'nothing\ncat', ['nothing', 'cat'], [0, 1]),
    ([0, 1, 255], None, ['class0', 'class1'], [0, 1, 255]),  # 255 is ignored
    ([0, 50, 100], None, ['class0', 'class1', 'class2'], [0, 1, 2]),
    ([0, 2, 255], 'a\nb\nc\nd', ['a', 'b', 'c', 'd'], [0, 2, 255]),  # a class that no mask has
    ([(0, 0, 0), (128, 0, 0), (0, 0, 255)], None, ['class0', 'class1', 'class2'], [0, 2, 1]),
    ([(0, 0, 0), (128, 0, 0), (0, 0, 255)], '# label:color_rgb:parts\ncat:128,0,0::\nsky:0,0,255::\nno:0,0,0::',
     ['cat', 'sky', 'no'], [2, 0, 1]),
])  # fmt: skip
def test_values_of_masks(tmp_path, colours, text, classes, expected):
    from PIL import Image

    (tmp_path / 'in/images').mkdir(parents=True)
    (tmp_path / 'in/masks').mkdir()
    values = np.array(colours, np.uint8)[np.arange(12).reshape(3, 4) % len(colours)]
    for name in 'ab':
        Image.new('RGB', (4, 3)).save(tmp_path / f'in/images/{name}.jpg')
        Image.fromarray(values).save(tmp_path / f'in/masks/{name}_mask.png')
    if text:
        (tmp_path / 'in' / ('labelmap.txt' if ':' in text else 'classes.txt')).write_text(text)
    folder, found, class_of = look_at(tmp_path / 'in', needed='masks')
    assert found.problems == [] and found.classes == classes
    fill_in_splits(found)
    write(folder, found, class_of, tmp_path / 'data')
    written = np.asarray(Image.open(tmp_path / 'data/masks/images/a.jpg.png'))
    assert (written == np.array(expected)[np.arange(12).reshape(3, 4) % len(expected)]).all()


@pytest.mark.parametrize('form, name, needed, message', [
    ('masks', 'auto', 'boxes', 'the labels are masks, and the config trains on boxes'),
    ('yolo', 'auto', 'masks', 'the labels are yolo, and the config trains on masks'),
    ('both', 'auto', 'boxes', 'has labels of coco and yolo: name one of them with --format'),
    ('both', 'masks', 'boxes', 'the labels are masks'),
    ('images', 'auto', 'boxes', 'images and no labels of coco, voc, yolo, masks'),
    ('nothing', 'auto', 'boxes', 'has no images'),
])  # fmt: skip
def test_which_format(toy_coco, tmp_path, form, name, needed, message):
    out = tmp_path / 'out'
    dict(
        masks=lambda: write_masks(toy_coco, out),
        yolo=lambda: write_yolo(toy_coco, out),
        both=lambda: (shutil.copytree(toy_coco, out), write_yolo(toy_coco, out)),
        images=lambda: shutil.copytree(toy_coco / 'val2017', out),
        nothing=out.mkdir,
    )[form]()
    with pytest.raises(UserError, match=message):
        read(Folder(out), name, needed)
