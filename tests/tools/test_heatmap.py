"""tools/heatmap.py as a user runs it, on models of all four kinds with random taps."""

import cv2
import numpy as np
import pytest
from mmengine.utils import is_installed

from bnet_mm.cli import UserError, common_arguments, load_config
from bnet_mm.visualization.inference import infer
from bnet_mm.visualization.shown import Shown
from helpers.tools import DEMO, SMALL, call_tool, load_tool

BN_DEMO = 'configs/faster_rcnn_r18_bn_demo.py'


@pytest.fixture
def image(shapes, monkeypatch):
    monkeypatch.setenv('DATA_ROOT', str(shapes))
    return sorted((shapes / 'val2017').iterdir())[0]


@pytest.fixture
def rows(monkeypatch):
    """What the tool put into its strips."""
    found = []
    strip = load_tool('heatmap').strip
    monkeypatch.setattr('bnet_mm.visualization.strips.strip', lambda *args: (found.append(args[0]), strip(*args))[1])
    return found


def test_two_detectors_in_rows(image, with_taps, rows, tmp_path):
    first, second = with_taps(DEMO, *SMALL), with_taps(BN_DEMO, *SMALL)
    done = call_tool(
        'heatmap', DEMO, first, image, '--out', tmp_path / 'o', '--compare', BN_DEMO, second, '--cfg-options', *SMALL
    )
    assert done is None and cv2.imread(str(tmp_path / 'o' / f'{image.stem}.png')).std() > 10
    (lines,) = rows
    assert [line.name.split(', ')[1] for line in lines] == ['enhancement', 'attention', 'attention']
    titles = ['predictions', *(f'backbone.layer{i}.1.bn2' for i in (1, 2, 3, 4))]
    assert [title for title, _ in lines[0].cells] == titles
    assert [title for title, _ in lines[2].cells][1:] == [f'backbone.layer{i}' for i in (1, 2, 3, 4)]
    picture = cv2.imread(str(image))
    assert all(cell.shape == picture.shape for line in lines for _, cell in line.cells)
    assert not np.array_equal(lines[1].cells[1][1], lines[2].cells[1][1])


def test_classifier_sees_its_crop(image, with_taps, rows, tmp_path):
    config = 'configs/resnet18_bnet3_imagenet.py'
    options = ['model.head.num_classes=3', 'test_dataloader.dataset.metainfo.classes=[a,b,c]']
    done = call_tool(
        'heatmap', config, with_taps(config, *options), image, '--out', tmp_path, '--layers', 'backbone.layer2.1.bn2',
        'backbone.layer4', '--cfg-options', *options,
    )  # fmt: skip
    assert done is None
    assert [[cell.shape for _, cell in line.cells] for line in rows[0]] == [[(224, 224, 3)] * 2] * 2


def test_segmentor(segmentation, with_taps, rows, tmp_path):
    config = segmentation('BN')
    image = sorted((tmp_path / 'images').iterdir())[0]
    assert call_tool('heatmap', config, with_taps(config), image, '--out', tmp_path) is None
    assert [len(line.cells) for line in rows[0]] == [5, 5]


@pytest.mark.data
@pytest.mark.skipif(not is_installed('mmaction2'), reason='needs mmaction2')
def test_frames_of_a_recogniser(with_taps, rows, tmp_path):
    from helpers.paths import SHARED_DATA

    config = 'configs/tsn_r50_bnet3_ucf101.py'
    options = ['model.backbone.pretrained=None', 'model.backbone.depth=18', 'model.cls_head.in_channels=512',
               'test_dataloader.dataset.pipeline.1.num_clips=2']  # fmt: skip
    video = SHARED_DATA / 'videos' / 'demo.mp4'
    done = call_tool(
        'heatmap', config, with_taps(config, *options), video, '--out', tmp_path, '--cfg-options', *options
    )
    assert done is None and len(rows[0]) == 8
    assert [line.cells[0][0] for line in rows[0][::2]] == [f'frame {i}' for i in (0, 5, 10, 15)]


def test_share_of_a_padded_input(image, with_taps, tmp_path):
    """90 x 61 pixels become 192 x 130, and 192 x 160 with the padding; boxes and picture are those of the file."""
    cv2.imwrite(str(tmp_path / 'i.png'), np.random.default_rng(0).integers(0, 255, (61, 90, 3)).astype(np.uint8))
    cfg = load_config(common_arguments('').parse_args([DEMO, '--cfg-options', *SMALL]))
    seen = infer(Shown('x', cfg, str(with_taps(DEMO, *SMALL)), []).model, cfg, str(tmp_path / 'i.png'))
    assert seen.share == (130 / 160, 1) and seen.pictures.shape == (1, 61, 90, 3)
    boxes = seen.sample.pred_instances.bboxes
    assert len(boxes) and boxes.max(0).values[2] <= 90 and boxes.max(0).values[3] <= 61
    assert (seen.pictures[0][..., ::-1] == cv2.imread(str(tmp_path / 'i.png'))).all()


@pytest.mark.parametrize('arguments, message', [
    ((DEMO, 'checkpoint', 'none.jpg'), 'none.jpg does not exist'),
    ((DEMO, 'checkpoint', 'image', '--layers', 'backbone.layer9'), 'the model has no backbone.layer9'),
    ((BN_DEMO, 'checkpoint', 'image'), 'lacks'),
    ((DEMO, 'checkpoint', 'text'), 'is neither an image'),
])  # fmt: skip
def test_what_is_refused(image, with_taps, tmp_path, arguments, message):
    (tmp_path / 'text').write_text('no image')
    places = dict(image=image, checkpoint=with_taps(DEMO, *SMALL), text=tmp_path / 'text')
    with pytest.raises(UserError, match=message):
        call_tool('heatmap', *(places.get(one, one) for one in arguments), '--out', tmp_path, '--cfg-options', *SMALL)
    assert not list(tmp_path.glob('*.png'))
