import shutil

import pytest

from helpers.tools import call_tool


@pytest.fixture(scope='module')
def toy(tmp_path_factory):
    """A folder with one small data set of each kind."""
    folder = tmp_path_factory.mktemp('toy')
    for layout in ('coco', 'cityscapes', 'voc', 'ucf101', 'imagenet'):
        assert call_tool('make_toy_data', layout, folder / layout, '--train', 12, '--val', 6, '--size', 64) is None
    (folder / 'voc').rename(folder / 'out')
    (folder / 'out/VOCdevkit').rename(folder / 'voc')
    shutil.copytree(folder / 'imagenet', folder / 'imagenette', ignore=lambda *_: ['meta'])
    return folder
