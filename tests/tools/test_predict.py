"""tools/predict.py as a user runs it, on models of all four kinds with random taps; the numbers are the hosts' own."""

import json
import shutil

import cv2
import numpy as np
import pytest
import torch
from mmengine.utils import is_installed

from bnet_mm.cli import UserError
from helpers.tools import DEMO, SMALL, call_tool

SCORE = ['--score-thr', '0', '--json']


@pytest.fixture
def images(shapes, monkeypatch):
    monkeypatch.setenv('DATA_ROOT', str(shapes))
    return shapes / 'val2017'


def written_config(config, options, tmp_path):
    """A config with the options in it, as the hosts' inferencers take it."""
    from bnet_mm.cli import common_arguments, load_config

    cfg = load_config(common_arguments('').parse_args([str(config), '--cfg-options', *options]))
    cfg.dump(tmp_path / 'written.py')
    return str(tmp_path / 'written.py')


def test_detector_finds_what_mmdet_does(images, with_taps, tmp_path, capsys):
    from mmdet.apis import DetInferencer

    checkpoint = with_taps(DEMO, *SMALL)
    out = tmp_path / 'out'
    assert call_tool('predict', DEMO, checkpoint, images, '--out', out, *SCORE, '--cfg-options', *SMALL) is None
    assert f'6 inputs, in {out}' in capsys.readouterr().out
    names = [path.stem for path in sorted(images.iterdir())]
    assert sorted(path.name for path in out.iterdir()) == sorted(
        f'{name}.{end}' for name in names for end in ('jpg', 'json')
    )
    theirs = DetInferencer(written_config(DEMO, SMALL, tmp_path), str(checkpoint), device='cpu', show_progress=False)
    for name in names[:2]:
        found = json.loads((out / f'{name}.json').read_text())
        expected = theirs(str(images / f'{name}.jpg'))['predictions'][0]
        assert found['labels'] == expected['labels'] and len(found['labels']) > 0
        np.testing.assert_allclose(found['scores'], expected['scores'], rtol=1e-5)
        np.testing.assert_allclose(found['bboxes'], expected['bboxes'], atol=1e-3)
        assert set(found['classes']) <= {'circle', 'square', 'triangle'}
        picture, original = cv2.imread(str(out / f'{name}.jpg')), cv2.imread(str(images / f'{name}.jpg'))
        assert picture.shape == original.shape and np.abs(picture.astype(int) - original).max() > 50


def test_segmentor_finds_what_mmseg_does(segmentation, with_taps, tmp_path, capsys):
    from mmseg.apis import MMSegInferencer
    from pycocotools.mask import decode

    config, out = segmentation('BN'), tmp_path / 'out'
    checkpoint = with_taps(config)
    image = tmp_path / 'images/0.png'
    assert call_tool('predict', config, checkpoint, image, '--out', out, '--json') is None
    found = json.loads((out / '0.json').read_text())
    expected = MMSegInferencer(str(config), str(checkpoint), device='cpu')(str(image))['predictions']
    assert expected.shape == (32, 32) and set(found['labels']) == set(np.unique(expected))
    for label, mask in zip(found['labels'], found['masks']):
        assert (decode(mask) == (expected == label)).all()
    assert '%' in capsys.readouterr().out and cv2.imread(str(out / '0.jpg')).shape == (32, 32, 3)


def test_classifier_finds_what_mmpretrain_does(images, with_taps, tmp_path, capsys):
    from mmpretrain.apis import ImageClassificationInferencer

    config, out = 'configs/resnet18_bnet3_imagenet.py', tmp_path / 'out'
    options = ['model.head.num_classes=3', 'test_dataloader.dataset.metainfo.classes=[a,b,c]']
    checkpoint = with_taps(config, *options)
    image = sorted(images.iterdir())[0]
    assert call_tool('predict', config, checkpoint, image, '--out', out, '--json', '--cfg-options', *options) is None
    found = json.loads((out / f'{image.stem}.json').read_text())
    theirs = ImageClassificationInferencer(written_config(config, options, tmp_path), str(checkpoint), device='cpu')
    (expected,) = theirs(str(image))
    np.testing.assert_allclose(found['scores'], np.sort(expected['pred_scores'])[::-1], rtol=1e-4)
    assert found['classes'][0] == expected['pred_class'] and len(found['labels']) == 3
    assert f'{image}: {expected["pred_class"]} {expected["pred_score"]:.2f}; ' in capsys.readouterr().out


@pytest.fixture(scope='session')
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp('clips') / 'ucf101'
    assert call_tool('make_toy_data', 'ucf101', folder, '--train', 1, '--val', 1, '--size', 64) is None
    return sorted((folder / 'videos').rglob('*.avi'))


@pytest.mark.skipif(not is_installed('mmaction2'), reason='needs mmaction2')
def test_recogniser_finds_what_mmaction_does(clips, with_taps, images, tmp_path, capsys):
    from mmaction.apis.inferencers import ActionRecogInferencer

    config, out = 'configs/tsn_r50_bnet3_ucf101.py', tmp_path / 'out'
    options = [
        'model.backbone.pretrained=None',
        'model.backbone.depth=18',
        'model.cls_head.in_channels=512',
        'test_dataloader.dataset.pipeline.1.num_clips=2',
        'test_dataloader.dataset.pipeline.4.type=CenterCrop',
    ]  # fmt: skip  (as theirs changes it)
    checkpoint = with_taps(config, *options)
    arguments = [config, checkpoint, '--out', out, '--json', '--cfg-options', *options]
    assert call_tool('predict', *arguments[:2], clips[0], *arguments[2:]) is None
    found = json.loads((out / f'{clips[0].stem}.json').read_text())
    theirs = ActionRecogInferencer(written_config(config, options, tmp_path), str(checkpoint), device='cpu')
    expected = theirs(str(clips[0]))['predictions'][0]['pred_scores']
    np.testing.assert_allclose(found['scores'], np.sort(expected)[:-6:-1], rtol=1e-4)
    assert found['labels'][0] == np.argmax(expected) and (out / f'{clips[0].stem}.jpg').is_file()
    with pytest.raises(UserError, match='000001.jpg is no video, and .* recognises actions in videos'):
        call_tool('predict', *arguments[:2], images / '000001.jpg', *arguments[2:])


def test_video_frame_by_frame(images, with_taps, tmp_path, capsys):
    out, checkpoint, clip = tmp_path / 'out', with_taps(DEMO, *SMALL), tmp_path / 'clip.avi'
    writer = cv2.VideoWriter(str(clip), cv2.VideoWriter.fourcc(*'MJPG'), 8, (96, 96))
    for path in sorted(images.iterdir())[:3]:
        writer.write(cv2.imread(str(path)))
    writer.release()
    video, frames = cv2.VideoCapture(str(clip)), []
    while (read := video.read())[0]:
        frames.append(read[1])
    cv2.imwrite(str(tmp_path / 'frame.png'), frames[2])
    arguments = [DEMO, checkpoint, clip, tmp_path / 'frame.png', '--out', out, *SCORE]
    assert call_tool('predict', *arguments, '--cfg-options', *SMALL) is None
    found = json.loads((out / 'clip.json').read_text())
    assert len(found) == 3 and f'{clip}: 3 frames' in capsys.readouterr().out
    assert json.loads((out / 'frame.json').read_text()) == found[2] != found[1]
    assert cv2.VideoCapture(str(out / 'clip.mp4')).get(cv2.CAP_PROP_FRAME_COUNT) == 3


def test_webcam_until_it_is_interrupted(images, with_taps, tmp_path, monkeypatch):
    class Webcam:
        frames = 0

        def __init__(self, number):
            assert number == 3

        def isOpened(self):
            return True

        def get(self, _):
            return -1.0

        def read(self):
            self.frames += 1
            if self.frames > 2:
                raise KeyboardInterrupt
            return True, cv2.imread(str(images / '000001.jpg'))

        def release(self):
            pass

    out, checkpoint = tmp_path / 'out', with_taps(DEMO, *SMALL)
    monkeypatch.setattr('bnet_mm.visualization.predictions.cv2.VideoCapture', Webcam)
    assert call_tool('predict', DEMO, checkpoint, '3', '--out', out, *SCORE, '--cfg-options', *SMALL) is None
    monkeypatch.undo()
    assert len(json.loads((out / 'webcam3.json').read_text())) == 2
    assert cv2.VideoCapture(str(out / 'webcam3.mp4')).get(cv2.CAP_PROP_FRAME_COUNT) == 2


@pytest.mark.parametrize('old_form', [False, True])
def test_released_checkpoint_as_it_is(images, tmp_path, old_form, capsys):
    from mmdet.apis import DetInferencer

    from helpers import official_layouts as official
    from helpers.checkpoints import WIDTH, detector_cfg, save

    checkpoint = official.detection_checkpoint(
        50, 5, seed=3, old_form=old_form, width=WIDTH, neck_channels=16, fc_channels=32
    )
    path = save(checkpoint, tmp_path / 'official.pth', legacy=old_form)
    detector_cfg(k=5).dump(tmp_path / 'config.py')
    image = images / '000001.jpg'
    assert call_tool('predict', tmp_path / 'config.py', path, image, '--out', tmp_path / 'out', *SCORE) is None
    found = json.loads((tmp_path / 'out/000001.json').read_text())
    theirs = DetInferencer(str(tmp_path / 'config.py'), path, device='cpu', show_progress=False)
    assert theirs(str(image))['predictions'][0]['labels'] == found['labels']
    assert len(found['labels']) > 0 and set(found['classes']) <= set(official.COCO_CLASSES)
    assert found['classes'] == [official.COCO_CLASSES[label] for label in found['labels']]


def test_config_by_name_and_an_incomplete_checkpoint(images, tmp_path):
    """Read by its name, the config's full-size model finds next to nothing in this file."""
    torch.save(dict(state_dict={'backbone.conv1.weight': torch.zeros(64, 3, 7, 7)}), tmp_path / 'less.pth')
    with pytest.raises(UserError, match='less.pth lacks .* tensors of this model'):
        call_tool(
            'predict', 'bnet_mm::faster_rcnn_r50_bnet5_1x', tmp_path / 'less.pth', images, '--out', tmp_path / 'out'
        )
    assert not (tmp_path / 'out').exists()


def test_a_damaged_image_does_not_stop_the_others(images, with_taps, tmp_path, capsys):
    shutil.copytree(images, tmp_path / 'in')
    (tmp_path / 'in/000002.jpg').write_bytes((images / '000002.jpg').read_bytes()[:500])
    with pytest.raises(UserError, match='1 of 6 inputs could not be predicted'):
        call_tool('predict', DEMO, with_taps(DEMO, *SMALL), tmp_path / 'in', '--out', tmp_path / 'out',
                  '--cfg-options', *SMALL)  # fmt: skip
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith('error: ')]
    assert line.startswith(f'error: {tmp_path}/in/000002.jpg cannot be decoded: ')
    assert len(list((tmp_path / 'out').iterdir())) == 5


@pytest.mark.parametrize('arguments, message', [
    (['nix.jpg'], 'nix.jpg does not exist'), (['IMAGES', '--score-thr', '30'], '--score-thr is from 0 to 1, got 30'),
    (['97'], '1 of 1 inputs could not be predicted'),
])  # fmt: skip
def test_what_is_refused(images, with_taps, tmp_path, arguments, message):
    arguments = [images if one == 'IMAGES' else one for one in arguments]
    with pytest.raises(UserError, match=message):
        call_tool(
            'predict', DEMO, with_taps(DEMO, *SMALL), *arguments, '--out', tmp_path / 'o', '--cfg-options', *SMALL
        )
