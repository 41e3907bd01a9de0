"""Facts and parts of COCO annotation files."""

import copy
import json

import pytest

from bnet_mm.cli import UserError
from bnet_mm.datasets.coco import coco_classes, subset
from helpers.tools import call_tool

# Objects of each image: 0: 1, 1: none, 2: 3, 3: 2 and one of them a crowd, 4: 2.
OBJECTS = {0: [0], 2: [0, 0, 0], 3: [0, 1], 4: [0, 0]}
COCO = dict(
    info='kept',
    images=[dict(id=i, file_name=f'{i}.jpg') for i in (4, 2, 0, 1, 3)],
    annotations=[
        dict(id=10 * image + i, image_id=image, iscrowd=crowd)
        for image, crowds in OBJECTS.items()
        for i, crowd in enumerate(crowds)
    ],
    categories=[dict(id=7, name='b'), dict(id=3, name='a')],
)


@pytest.mark.parametrize('images, most, chosen', [
    (1, 9, [0]), (2, 9, [0, 2]), (3, 9, [0, 2, 4]), (2, 2, [0, 4]), (1, 1, [0]),
])  # fmt: skip
def test_subset(images, most, chosen):
    before = copy.deepcopy(COCO)
    found = subset(COCO, images, most)
    assert COCO == before
    assert [image['id'] for image in found['images']] == chosen
    want = [(image, 10 * image + i) for image in chosen for i in range(len(OBJECTS[image]))]
    assert [(one['image_id'], one['id']) for one in found['annotations']] == want
    assert found['info'] == 'kept' and found['categories'] == COCO['categories']


def test_too_few_images():
    with pytest.raises(ValueError, match='only 2 images have 1 to 2 annotations, 3 asked for'):
        subset(COCO, 3, 2)


def test_classes(tmp_path):
    path = tmp_path / 'a.json'
    path.write_text(json.dumps(COCO))
    assert coco_classes(str(path)) == ('a', 'b')
    for text in ('{', '[]', '{"categories": 3}', '{"categories": [{"id": 1}]}'):
        path.write_text(text)
        with pytest.raises(ValueError, match='a.json is not a COCO annotation file'):
            coco_classes(str(path))
    with pytest.raises(FileNotFoundError):
        coco_classes(str(tmp_path / 'no.json'))


def test_tool(tmp_path):
    source, target = tmp_path / 'a.json', tmp_path / 'b.json'
    source.write_text(json.dumps(COCO))
    assert call_tool('coco_subset', source, target, '--images', 2, '--max-objects', 2) is None
    assert json.loads(target.read_text()) == subset(COCO, 2, 2)
    with pytest.raises(UserError, match='exists already'):
        call_tool('coco_subset', source, target)
    with pytest.raises(UserError, match='only 3 images have 1 to 6'):
        call_tool('coco_subset', source, tmp_path / 'c.json', '--images', 4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ['a.json', 'b.json']
