"""The check of a data set finds what is wrong in toy data of every layout."""

import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from bnet_mm.datasets.catalogue import DATA_SETS
from helpers.paths import SHARED_DATA

INSTANCES = 'annotations/instances_train2017.json'
LABELS = 'gtFine/train/aachen/aachen_000001_000019_gtFine_labelTrainIds.png'
VOC_LISTS = 'VOC2012/ImageSets/Segmentation'
UCF_LIST = 'ucf101_train_split_1_videos.txt'
VIDEO = 'videos/Square/v_Square_g08_c01.avi'


@pytest.mark.parametrize('name', DATA_SETS)
def test_complete_but_small(toy, prepare_data, name):
    code, out, err = prepare_data(name, toy / name, '--check', '--any-size')
    assert code == 0 and 'is complete' in out and not err
    code, out, err = prepare_data(name, toy / name, '--check')
    assert code == 1 and 'is complete' not in out
    for part, (count, _) in DATA_SETS[name].parts.items():
        assert re.search(f'error: {part} has \\d+ samples, the published data set {count} ', err), err
    if name not in ('cityscapes', 'voc'):
        assert f'val has 3 classes, the published data set {DATA_SETS[name].classes} ' in err


def edit(path, change):
    path.write_text(change(path.read_text()))


def edit_json(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def halve(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def write_label(path, label):
    mask = np.array(Image.open(path))
    mask[:2] = label
    Image.fromarray(mask).save(path)


DAMAGES = {
    'coco, an image': ('coco', lambda r: (r / 'val2017/000001.jpg').unlink(), ['val2017/000001.jpg', 'val2017.zip']),
    'coco, the images': ('coco', lambda r: shutil.rmtree(r / 'train2017'), ['missing: {}/train2017; made by']),
    'coco, the annotations': ('coco', lambda r: shutil.rmtree(r / 'annotations'), ['{}/annotations; made by: wget']),
    'coco, half an image': ('coco', lambda r: halve(r / 'train2017/000002.jpg'), ['{}/train2017/000002.jpg cannot be']),
    'coco, another image': (
        'coco',
        lambda r: Image.new('RGB', (64, 32)).save(r / 'train2017/000002.jpg'),
        ['{}/train2017/000002.jpg is 64 x 32, in the annotations 64 x 64'],
    ),
    'coco, half a JSON': ('coco', lambda r: halve(r / INSTANCES), ['{}/' + INSTANCES, 'no COCO annotation file']),
    'coco, a list': ('coco', lambda r: (r / INSTANCES).write_text('[1]'), ['no COCO annotation file']),
    'coco, a category': (
        'coco',
        lambda r: edit_json(r / INSTANCES, lambda coco: coco['annotations'][0].update(category_id=77)),
        [INSTANCES, 'annotation 1 has'],
    ),
    'coco, a polygon': (
        'coco',
        lambda r: edit_json(r / INSTANCES, lambda coco: coco['annotations'][0].update(segmentation=[[1, 2]])),
        ['the segmentation of annotation 1'],
    ),
    'coco, a name': (
        'coco',
        lambda r: edit_json(r / INSTANCES, lambda coco: coco['images'][0].update(file_name='no.jpg')),
        ['missing: {}/train2017/no.jpg'],
    ),
    'cityscapes, a mask': ('cityscapes', lambda r: (r / LABELS).unlink(), [LABELS, 'dataset_converters/cityscapes.py']),
    'cityscapes, all masks': ('cityscapes', lambda r: shutil.rmtree(r / 'gtFine'), ['{}/gtFine; made by: csDownload']),
    'cityscapes, an image': (
        'cityscapes',
        lambda r: (r / 'leftImg8bit/val/frankfurt/frankfurt_000001_000019_leftImg8bit.png').unlink(),
        ['frankfurt_000001_000019_leftImg8bit.png; made by: csDownload'],
    ),
    'cityscapes, a label': ('cityscapes', lambda r: write_label(r / LABELS, 26), [LABELS, 'labels [26], beyond']),
    'voc, a label': (
        'voc',
        lambda r: write_label(r / 'VOC2012/SegmentationClass/2011_000003.png', 21),
        ['2011_000003.png has the labels [21]'],
    ),
    'voc, a colour mask': (
        'voc',
        lambda r: Image.new('RGB', (64, 64)).save(r / 'VOC2012/SegmentationClass/2011_000003.png'),
        ['2011_000003.png has the shape (64, 64, 3), not (64, 64)'],
    ),
    'voc, the augmentation': (
        'voc',
        lambda r: shutil.rmtree(r / 'VOC2012/SegmentationClassAug'),
        ['missing: {}/VOC2012/SegmentationClassAug; made by', 'voc_aug.py'],
    ),
    'voc, a list': ('voc', lambda r: (r / VOC_LISTS / 'aug.txt').unlink(), ['aug.txt; made by', 'voc_aug.py']),
    'voc, a name': (
        'voc',
        lambda r: edit(r / VOC_LISTS / 'val.txt', lambda text: f'{text}no\n'),
        ['VOC2012/JPEGImages/no.jpg, {}/VOC2012/SegmentationClass/no.png; made by', 'VOCtrainval_11-May-2012.tar'],
    ),
    'voc, val in train': (
        'voc',
        lambda r: shutil.copy(r / VOC_LISTS / 'val.txt', r / VOC_LISTS / 'train.txt'),
        ['2011_000000.jpg, listed in val, is in train already', '6 problems'],
    ),
    'ucf101, a video': ('ucf101', lambda r: (r / VIDEO).unlink(), ['missing: {}/' + VIDEO, 'UCF101.rar']),
    'ucf101, half a video': ('ucf101', lambda r: halve(r / VIDEO), ['{}/' + VIDEO + ' cannot be decoded']),
    'ucf101, a list': ('ucf101', lambda r: (r / UCF_LIST).unlink(), [UCF_LIST + '; made by', 'build_file_list.py']),
    'ucf101, the official list': (
        'ucf101',
        lambda r: shutil.copy(r / 'ucfTrainTestlist/testlist01.txt', r / UCF_LIST),
        ["not a file and a label: 'Circle/v_Circle_g01_c01.avi'"],
    ),
    'ucf101, a label': (
        'ucf101',
        lambda r: edit(r / UCF_LIST, lambda text: text.replace(' 2', ' 101')),
        ['has the label 101 in train, beyond 0 to 100', 'its class 101 before'],
    ),
    'imagenet, a name': (
        'imagenet',
        lambda r: edit(r / 'meta/val.txt', lambda text: f'{text}n00000002/no.JPEG 2\n'),
        ['missing: {}/val/n00000002/no.JPEG', 'from torchvision.datasets import ImageNet'],
    ),
    'imagenet, a class': (
        'imagenet',
        lambda r: [shutil.rmtree(r / 'meta'), shutil.rmtree(r / 'val/n00000001')],
        ['has the label 1 in val, its class 2 before'],
    ),
    'imagenet, half': ('imagenet', lambda r: shutil.rmtree(r / 'train'), ['missing: {}/train; made by', ' train\n']),
    'imagenette, half': ('imagenette', lambda r: shutil.rmtree(r / 'train'), ['{}/train; made by', 'imagenette2.tgz']),
    'imagenette, an image': (
        'imagenette',
        lambda r: (r / 'val/n00000000/ILSVRC2012_val_00000000.JPEG').write_text('junk'),
        ['ILSVRC2012_val_00000000.JPEG cannot be decoded'],
    ),
    'imagenette, all images': (
        'imagenette',
        lambda r: [shutil.rmtree(folder) for folder in (r / 'val').iterdir()],
        ['val has 0 samples'],
    ),
}


@pytest.mark.parametrize('damage', DAMAGES)
def test_damage(toy, tmp_path, prepare_data, damage):
    name, do, expected = DAMAGES[damage]
    root = tmp_path / name
    shutil.copytree(toy / name, root)
    do(root)
    code, out, err = prepare_data(name, root, '--check', '--any-size')
    assert code == 1 and 'is complete' not in out
    for text in expected:
        assert text.format(root) in err


@pytest.mark.data
def test_real_images(prepare_data):
    code, out, _ = prepare_data('coco', SHARED_DATA / 'mini_coco', '--check', '--any-size')
    assert code == 0 and out.count('20 samples opened') == 2
    assert prepare_data('coco', SHARED_DATA / 'mini_coco', '--check')[0] == 1
