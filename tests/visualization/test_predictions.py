"""Inputs and outputs of tools/predict.py; tests/tools/test_predict.py has the models."""

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.structures import InstanceData, PixelData

from bnet_mm.cli import UserError
from bnet_mm.visualization.predictions import Input, Video, as_numbers, find_inputs, in_words, recorded


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in (
        'a/1.jpg',
        'a/2.PNG',
        'a/deep/1.tif',
        'a/x.txt',
        'a/.hidden.jpg',
        'v.mp4',
        'b.webp',
        'b [1].jpg',
        'empty/x.txt',
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).touch()


@pytest.mark.parametrize('words, found', [
    (['a'], [('a/1.jpg', '1'), ('a/2.PNG', '2'), ('a/deep/1.tif', 'deep/1')]),
    (['a/*.jpg', 'v.mp4'], [('a/1.jpg', '1'), ('v.mp4', 'v')]),
    (['a/**/1.*'], [('a/1.jpg', '1.jpg'), ('a/deep/1.tif', '1.tif')]),
    (['a/*'], [('a/1.jpg', '1.jpg'), ('a/2.PNG', '2'), ('a/deep/1.tif', '1.tif')]),
    (['b [1].jpg'], [('b [1].jpg', 'b [1]')]),
    (['0'], [(0, 'webcam0')]),
])  # fmt: skip
def test_inputs(files, words, found):
    assert find_inputs(words) == [Input(*one) for one in found]


def test_inputs_of_the_same_name(files):
    with pytest.raises(UserError, match='a/1.jpg and a/1.jpg would both be 1.jpg: give one of them'):
        find_inputs(['a', 'a/1.jpg'])


@pytest.mark.parametrize('word, message', [
    ('nix.jpg', 'nix.jpg does not exist'), ('a/*.gif', r'a/\*.gif does not exist'),
    ('a/x.txt', 'a/x.txt is neither an image .*jpg.* nor a video .*mp4'), ('empty', 'empty has no images or videos'),
])  # fmt: skip
def test_inputs_that_are_refused(files, word, message):
    with pytest.raises(UserError, match=message):
        find_inputs([word])


def test_kinds(files):
    image, video, webcam = find_inputs(['a/2.PNG', 'v.mp4', '0'])
    assert [(one.is_image, one.is_video) for one in (image, video, webcam)] == [
        (True, False),
        (False, True),
        (False, False),
    ]


def test_recorded_video_is_read_again(tmp_path):
    frames = [np.full((48, 64, 3), (20 * i, 100, 200), np.uint8) for i in range(5)]
    with recorded(tmp_path / 'v.mp4', 8) as add:
        for frame in frames:
            add(frame)
    assert [path.name for path in tmp_path.iterdir()] == ['v.mp4']
    video = Video(str(tmp_path / 'v.mp4'))
    assert (video.rate, video.frames) == (8, 5)
    read = [frame[..., ::-1] for frame in video]
    assert len(read) == 5 and max(np.abs(a.astype(int) - b).mean() for a, b in zip(read, frames)) < 6


def test_nothing_is_left_of_a_video_that_fails(tmp_path):
    with pytest.raises(ZeroDivisionError), recorded(tmp_path / 'v.mp4', 8) as add:
        add(np.zeros((48, 64, 3), np.uint8))
        1 / 0  # noqa: B018
    assert not [*tmp_path.iterdir()]


def test_videos_that_cannot_be_opened(tmp_path):
    (tmp_path / 'v.mp4').write_text('no video')
    with pytest.raises(UserError, match='v.mp4 cannot be opened as a video'):
        Video(str(tmp_path / 'v.mp4'))
    with pytest.raises(UserError, match='webcam 97 cannot be opened'):
        Video(97)


def test_numbers_of_objects():
    from pycocotools.mask import decode

    masks = torch.zeros(3, 4, 5, dtype=torch.bool)
    masks[0, 1:3, 2:4] = True
    objects = InstanceData(
        labels=torch.tensor([1, 0, 1]),
        scores=torch.tensor([0.9, 0.2, 0.5]),
        bboxes=torch.arange(12.0).reshape(3, 4),
        masks=masks,
    )

    class Sample:
        pred_instances = objects

    numbers = as_numbers(Config(dict(default_scope='mmdet')), Sample, dict(classes=('a', 'b')), 0.5)
    assert numbers['labels'] == [1, 1] and numbers['classes'] == ['b', 'b'] and numbers['bboxes'][1] == [8, 9, 10, 11]
    assert (decode(numbers['masks'][0]) == masks[0].numpy()).all() and len(numbers['masks']) == 2
    assert in_words(numbers) == '2 b' and in_words(dict(numbers, classes=[])) == 'nothing'


def test_numbers_of_a_segmentor():
    class Sample:
        pred_sem_seg = PixelData(data=torch.tensor([[[0, 0, 0], [2, 2, 2], [2, 2, 2], [2, 2, 1]]]))

    numbers = as_numbers(Config(dict(default_scope='mmseg')), Sample, dict(classes=('a', 'b')), 0.5)
    assert numbers['labels'] == [0, 1, 2] and numbers['shares'] == [3 / 12, 1 / 12, 8 / 12]
    assert in_words(numbers) == '2 67%, a 25%, b 8%'  # a class without a name


@pytest.mark.parametrize('scope', ['mmpretrain', 'mmaction'])
def test_numbers_of_a_classifier(scope):
    class Sample:
        pred_score = torch.tensor([0.1, 0.7, 0.2])

    numbers = as_numbers(Config(dict(default_scope=scope)), Sample, {}, 0.5)
    assert numbers['labels'] == [1, 2, 0] and numbers['scores'] == pytest.approx([0.7, 0.2, 0.1])
    assert in_words(numbers) == '1 0.70; 2 0.20; 0 0.10'
