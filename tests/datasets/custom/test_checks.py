"""The usual mistakes in people's data: each is a sentence with the file, and nothing else is said."""

import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from bnet_mm.cli import UserError
from bnet_mm.datasets.custom.checks import look
from bnet_mm.datasets.custom.folder import Folder
from bnet_mm.datasets.custom.formats import read
from bnet_mm.datasets.custom.output import coco_dict, fill_in_splits
from helpers.label_formats import write_masks, write_voc, write_yolo

ORIENTATION = 274


@pytest.fixture(scope='module')
def forms(toy_coco, tmp_path_factory):
    root = tmp_path_factory.mktemp('forms')
    shutil.copytree(toy_coco, root / 'coco')
    write_voc(toy_coco, root / 'voc')
    write_yolo(toy_coco, root / 'yolo')
    write_masks(toy_coco, root / 'masks')
    return root


@pytest.fixture
def looked(forms, tmp_path):
    """What is found in a copy of a folder that a function has changed."""

    def run(form, change):
        root = tmp_path / form
        shutil.copytree(forms / form, root)
        change(root)
        folder = Folder(root)
        found = read(folder, form, 'masks' if form == 'masks' else 'boxes')
        look(folder, found, list(found.samples))
        return found

    return run


def edit(file, old, new, count=1):
    """Replace in a text file."""

    def change(root):
        text = (root / file).read_text()
        assert old in text
        (root / file).write_text(text.replace(old, new, count))

    return change


def edit_json(change_content, file='annotations/instances_train2017.json'):
    def change(root):
        content = json.loads((root / file).read_text())
        change_content(content)
        (root / file).write_text(json.dumps(content))

    return change


def write(file, content):
    return lambda root: (root / file).write_bytes(content if isinstance(content, bytes) else content.encode())


def save(file, make, **options):
    """Write an image made from the one that is there."""

    def change(root):
        image = Image.open(root / file).convert('RGB')
        make(image).save(root / file, **options)

    return change


def turned(orientation):
    """The image as a camera saves it that was held upright or not: as many pixels, and a tag."""

    def change(root, file='images/train/000001.jpg'):
        image = Image.open(root / file)
        exif = image.getexif()
        exif[ORIENTATION] = orientation
        image.resize((64, 48)).save(root / file, exif=exif)

    return change


def turned_with_annotations(root):
    turned(6)(root, 'train2017/000001.jpg')
    edit_json(lambda c: c['images'][0].update(width=64, height=48))(root)


def half(file):
    return lambda root: (root / file).write_bytes((root / file).read_bytes()[:-200])


def remove(*files):
    return lambda root: [(root / file).unlink() for file in files]


def empty_folder(root):
    shutil.rmtree(root / 'images/val')
    shutil.rmtree(root / 'labels/val')
    (root / 'images/val').mkdir()


BOX = '0 0.5 0.5 0.2 0.2'
LABELS = 'labels/train/000001.txt'
IMAGE = 'images/train/000001.jpg'
TRAIN = 'annotations/instances_train2017.json'
PROBLEMS = {
    'damaged image': ('yolo', half(IMAGE), f'{IMAGE} cannot be decoded: image file is'),
    'no image': ('yolo', write(IMAGE, '<html>'), f'{IMAGE} cannot be decoded: cannot'),
    'ids from 1': ('yolo', write(LABELS, '3 0.5 0.5 0.2 0.2'),
                   f'{LABELS}, line 1: class 3, but data.yaml names 3, counted from 0'),
    'pixels': ('yolo', write(LABELS, f'{BOX}\n0 32 32 10 10'), f'{LABELS}, line 2: 32 is no share of the size'),
    'a word': ('yolo', write(LABELS, 'cat 0.5 0.5 0.2 0.2'), f"{LABELS}, line 1: invalid literal|could not convert"),
    'too few numbers': ('yolo', write(LABELS, '0 0.5 0.5'), f'{LABELS}, line 1: a class and 2 numbers are neither'),
    'detections': ('yolo', write(LABELS, f'{BOX} 0.9'), f'{LABELS}, line 1: six numbers are a detection'),
    'outside': ('yolo', write(LABELS, '0 1.5 0.5 0.2 0.2'),
                rf"the box \[89.6, 25.6, 12.8, 12.8\] of 'circle' in {LABELS} is outside of {IMAGE}, 64 x 64"),
    'no area': ('yolo', write(LABELS, '0 0.5 0.5 0 0.2'), f'in {LABELS} has no area'),
    'no names': ('yolo', remove('data.yaml'), 'no file in .* names the classes'),
    'labels without image': ('yolo', remove('images/train/000001.jpg'), f'{LABELS} has no image'),
    'empty split': ('yolo', empty_folder, 'the split val is empty: images/val has no image with labels'),
    'no labels at all': ('yolo', lambda root: [path.write_text('') for path in (root / 'labels').rglob('*.txt')],
                         'no image in .* has an object'),
    'turned by its camera': ('coco', turned_with_annotations,
                             f'000001.jpg is turned by its EXIF orientation, 6, when it is read, and {TRAIN} is for '
                             'the picture before, 64 x 48'),
    'other size': ('coco', edit_json(lambda c: c['images'][0].update(width=640)),
                   'train2017/000001.jpg is 64 x 64, in annotations/instances_train2017.json 640 x 64'),
    'image is missing': ('coco', remove('train2017/000001.jpg'),
                         '000001.jpg, listed in annotations/instances_train2017.json, does not exist'),
    'unknown category': ('coco', edit_json(lambda c: c['annotations'][0].update(category_id=9)),
                         'annotation 1 in annotations/instances_train2017.json has an image_id or category_id that'),
    'no boxes': ('coco', edit_json(lambda c: c['annotations'][0].pop('bbox')),
                 "instances_train2017.json cannot be read as COCO: an entry has no 'bbox'"),
    'no images': ('coco', edit_json(lambda c: c.update(images=[], annotations=[])),
                  'annotations/instances_train2017.json lists no image'),
    'two files': ('coco', lambda root: shutil.copy(root / TRAIN, root / 'instances_train.json'),
                  'instances_train.json and annotations/instances_train2017.json are both for train: keep one'),
    'half a polygon': ('coco', edit_json(lambda c: c['annotations'][0].update(segmentation=[[1, 2, 3, 4]])),
                       rf"a polygon of the box .* in {TRAIN} has fewer than three points"),
    'a number in the place of a list': ('coco', edit_json(lambda c: c.update(categories=[3])),
                                        f'{TRAIN} cannot be read as COCO: '),
    'no YAML': ('yolo', write('data.yaml', 'names: [a'), 'data.yaml cannot be read as YAML: while parsing'),
    'no XML': ('voc', write('Annotations/train_000001.xml', '<annotation>'),
               'Annotations/train_000001.xml cannot be read as VOC: no'),
    'no box': ('voc', edit('Annotations/train_000001.xml', 'xmin', 'left', 9),
               'Annotations/train_000001.xml cannot be read as VOC: an object without name or bndbox'),
    'no such image': ('voc', lambda root: (root / 'JPEGImages/train_000001.jpg').rename(root / 'JPEGImages/1.jpg'),
                      'Annotations/train_000001.xml has no image: there is no train_000001.jpg or the like'),
    'empty list': ('voc', write('ImageSets/Main/val.txt', ''),
                   'the split val is empty: ImageSets/Main/val.txt has no image'),
    'size of the mask': ('masks', save('masks/train_000001.png', lambda image: image.resize((32, 64)).convert('L')),
                         'masks/train_000001.png is 32 x 64, its image 64 x 64'),
    'mask in JPEG': ('masks', lambda root: (root / 'masks/train_000001.png').rename(root / 'masks/train_000001.jpg'),
                     'masks/train_000001.jpg is a mask in JPEG, which changes its values'),
    'smooth mask': ('masks', save('masks/train_000001.png', lambda image: Image.fromarray(
        np.random.default_rng(0).integers(0, 255, (64, 64, 3)).astype(np.uint8))),
        r'masks/train_000001.png has 4\d+ different values, a mask has one a class'),
    'two masks': ('masks', lambda root: shutil.copy(
        root / 'masks/train_000001.png', root / 'masks/train_000001_mask.png'),
                  'images/train_000001.jpg has several masks: masks/train_000001.png, masks/train_000001_mask.png'),
    'too few names': ('masks', write('classes.txt', 'one\ntwo'), 'classes.txt names 2 classes, the masks have the val'),
    'damaged mask': ('masks', half('masks/train_000001.png'), 'masks/train_000001.png cannot be decoded'),
}  # fmt: skip


@pytest.mark.parametrize('case', PROBLEMS)
def test_problem(looked, case):
    form, change, message = PROBLEMS[case]
    found = looked(form, change)
    assert len(found.problems) == 1 and re.search(message, found.problems[0]), found.problems
    assert '\n' not in found.problems[0] and len(found.problems[0]) < 250


NOTES = {
    'more bits': ('yolo', lambda root: Image.fromarray(np.full((64, 64), 40000, np.uint16)).save(
        root / 'images/train/000001.png'),
                  'more than 8 bits a channel, read as 8: images/train/000001.png'),
    'grey': ('yolo', save('images/train/000001.jpg', lambda image: image.convert('L')),
             'grey, read as three equal channels: images/train/000001.jpg'),
    'turned': ('yolo', turned(6), 'turned by EXIF orientation, with labels taken for the upright picture: images'),
    'no label file': ('yolo', remove(LABELS), 'no label file: images/train/000001.jpg, images/train/000015.jpg$'),
    'cut': ('yolo', write(LABELS, '0 0.95 0.5 0.2 0.2'), rf'boxes cut at the border of their image: .* in {LABELS}$'),
    'spaces': ('voc', lambda root: [edit(f'Annotations/{path.name}', '<name>circle', '<name> circle ')(root)
                                    for path in (root / 'Annotations').iterdir() if 'circle' in path.read_text()],
               "class ' circle ' has spaces around its name, 'circle' is meant: Annotations/"),
    'ids from 0': ('coco', edit_json(lambda c: c['annotations'][0].update(id=0)),
                   'annotation ids start at 0, .* numbered anew from 1: annotations/instances_train2017.json'),
    'not listed': ('coco', lambda root: shutil.copy(root / 'train2017/000001.jpg', root / 'new.jpg'),
                   'no labels, so left out: new.jpg'),
    'no mask': ('masks', remove('masks/train_000001.png'), 'no mask, so left out: images/train_000001.jpg'),
    'no names': ('masks', remove('classes.txt'), 'names of the classes are missing: put them into classes.txt'),
}  # fmt: skip


@pytest.mark.parametrize('case', NOTES)
def test_note(looked, case):
    form, change, message = NOTES[case]
    found = looked(form, change)
    assert found.problems == [] and any(re.match(message, line) for line in found.sentences()), found.sentences()


def test_nothing_is_said_of_good_data(looked):
    for form in ('coco', 'voc', 'yolo', 'masks'):
        found = looked(form, lambda root: None)
        left = [note for note in found.notes if note not in ('no label file', 'no object in it')]
        assert found.problems == [] and left == [], form


def test_an_image_turned_by_its_camera_has_the_size_that_openmmlab_reads(looked, tmp_path):
    mmcv = pytest.importorskip('mmcv')
    found = looked('yolo', turned(6))
    (sample,) = (sample for sample in found.samples if sample.file == 'images/train/000001.jpg')
    assert sample.size == (48, 64)
    assert mmcv.imread(str(tmp_path / 'yolo' / sample.file)).shape == (64, 48, 3)


def test_boxes_are_cut(looked):
    found = looked('yolo', write(LABELS, '0 0.95 0.5 0.2 0.2\n0 0.0 0.0 0.5 0.5'))
    (sample,) = (sample for sample in found.samples if sample.labels == LABELS)
    np.testing.assert_allclose(sample.objects[0]['bbox'], [54.4, 25.6, 9.6, 12.8])
    np.testing.assert_allclose(sample.objects[1]['bbox'], [0, 0, 16, 16])


def test_names_with_spaces_inside_are_kept(looked):
    found = looked('yolo', edit('data.yaml', 'circle', 'traffic light'))
    assert found.classes[0] == 'traffic light' and found.problems == []


def test_an_annotation_with_the_id_0_counts_as_missed():
    """Why it is worth a word: pycocotools marks a detection by the id of its object, and 0 is none."""
    import contextlib
    import io

    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    precision = []
    for start in (1, 0):
        boxes = [[0, 0, 20, 20], [30, 30, 20, 20]]
        truth = COCO()
        truth.dataset = dict(
            images=[dict(id=1, width=64, height=64)], categories=[dict(id=1, name='a')],
            annotations=[dict(id=start + i, image_id=1, category_id=1, bbox=box, area=400, iscrowd=0)
                         for i, box in enumerate(boxes)],
        )  # fmt: skip
        with contextlib.redirect_stdout(io.StringIO()):
            truth.createIndex()
            found = truth.loadRes([dict(image_id=1, category_id=1, bbox=box, score=0.9) for box in boxes])
            evaluation = COCOeval(truth, found, 'bbox')
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        precision.append(evaluation.stats[0])
    assert precision[0] == pytest.approx(1) and precision[1] < 0.6


def test_ids_are_numbered_from_one(looked):
    found = looked('coco', edit_json(lambda c: [one.update(id=one['id'] - 1) for one in c['annotations']]))
    ids = [one['id'] for one in coco_dict(found.of('train'), found.classes)['annotations']]
    assert ids == [*range(1, len(ids) + 1)]


def test_classes_that_train_lacks_and_a_test_in_the_place_of_val(looked):
    def change(root):
        for part in ('images', 'labels'):
            (root / part / 'val').rename(root / part / 'test')
        for path in (root / 'labels/train').iterdir():
            path.write_text(''.join(f'{line}\n' for line in path.read_text().splitlines() if line[0] != '1'))

    found = looked('yolo', change)
    fill_in_splits(found)
    assert found.problems == [] and len(found.of('val')) == 5 and not found.of('test')
    assert found.notes['classes without an object in train'] == ['square']
    assert any(note.startswith('there is no val, so test') for note in found.notes)


def test_a_single_image_cannot_be_split(looked):
    def change(root):
        for path in [*root.rglob('*.jpg'), *root.rglob('0*.txt')]:
            if path.stem != '000001':
                path.unlink()
        for part in ('images', 'labels'):
            (root / part / 'train').rename(root / part / 'some')
            shutil.rmtree(root / part / 'val')

    with pytest.raises(UserError, match='images/some/000001.jpg is the only image'):
        fill_in_splits(looked('yolo', change))
