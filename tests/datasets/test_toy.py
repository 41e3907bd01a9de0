"""The toy data sets are seeded, and the hosts' own data sets read them."""

import numpy as np
import pytest

from bnet_mm.cli import UserError
from helpers.hosts import import_host_models
from helpers.tools import call_tool

LAYOUTS = ['coco', 'coco_occluded', 'cityscapes', 'voc', 'ucf101', 'imagenet']


def make(layout, folder, *options):
    return call_tool('make_toy_data', layout, folder, '--size', 64, *options)


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp('toy')
    for layout in LAYOUTS:
        assert make(layout, root / layout, '--train', 18, '--val', 7) is None
    return root


@pytest.mark.parametrize('layout', LAYOUTS)
def test_seeded(data, tmp_path, layout):
    assert make(layout, tmp_path / 'again', '--train', 18, '--val', 7) is None
    files = sorted(path for path in (data / layout).rglob('*') if path.is_file())
    assert len(files) >= 25
    for file in files:
        assert file.read_bytes() == (tmp_path / 'again' / file.relative_to(data / layout)).read_bytes(), file
    assert make(layout, tmp_path / 'other', '--train', 18, '--val', 7, '--seed', 1) is None
    assert any(
        file.read_bytes() != (tmp_path / 'other' / file.relative_to(data / layout)).read_bytes() for file in files
    )


def test_refusals(data, tmp_path):
    with pytest.raises(UserError, match='exists already'):
        make('coco', data / 'coco')
    with pytest.raises(UserError, match='--train and --val must be at least 1'):
        make('imagenet', tmp_path / 'x', '--val', 0)
    assert not (tmp_path / 'x').exists()


def test_coco_has_crowds_and_empty_images(data):
    coco = pytest.importorskip('pycocotools.coco').COCO(str(data / 'coco/annotations/instances_train2017.json'))
    crowds = coco.loadAnns(coco.getAnnIds(iscrowd=True))
    assert crowds
    for annotation in crowds:
        mask = coco.annToMask(annotation)
        assert mask.shape == (64, 64) and mask.sum() == annotation['area']
        x, y, w, h = annotation['bbox']
        assert mask[y : y + h, x : x + w].sum() == mask.sum() and mask[y : y + h, x].any() and mask[y, x : x + w].any()
    assert any(not coco.getAnnIds(imgIds=image) for image in coco.getImgIds())


def test_occluded_objects_cover_each_other_and_are_cut_off(data):
    """There are more of them than in the other layout, each shows less of itself, and half of them touch the border."""
    coco_api = pytest.importorskip('pycocotools.coco')

    def objects(layout):
        coco = coco_api.COCO(str(data / layout / 'annotations/instances_train2017.json'))
        found = [one for one in coco.anns.values() if not one['iscrowd']]
        boxes = np.array([one['bbox'] for one in found])
        at_border = (boxes[:, :2] <= 0).any(1) | (boxes[:, :2] + boxes[:, 2:] >= 64).any(1)
        return len(found), float(np.mean([one['area'] for one in found])), at_border.mean()

    (few, whole, inside), (many, parts, cut) = objects('coco'), objects('coco_occluded')
    assert many > 2 * few and parts < 0.9 * whole and cut > 0.4 > inside


def test_run_lengths_are_cocos():
    coco_mask = pytest.importorskip('pycocotools.mask')
    from bnet_mm.datasets.toy import run_lengths

    rng = np.random.default_rng(0)
    for share in (0.0, 0.3, 0.7, 1.0):
        mask = (rng.random((7, 5)) < share).astype(np.uint8)
        decoded = coco_mask.decode(coco_mask.frPyObjects(run_lengths(mask), 7, 5))
        assert np.array_equal(decoded, mask)


def test_segmentation_data_sets(data):
    import_host_models('mmseg')
    from mmseg.datasets import CityscapesDataset, PascalVOCDataset
    from mmseg.datasets.transforms import LoadAnnotations

    def labels(dataset, number):
        assert len(dataset) == number
        info = LoadAnnotations()({**dataset.get_data_info(0), 'img_path': ''})
        return set(np.unique(info['gt_seg_map']))

    prefix = dict(img_path='leftImg8bit/train', seg_map_path='gtFine/train')
    found = labels(CityscapesDataset(data_root=str(data / 'cityscapes'), data_prefix=prefix), 18)
    assert {0, 255} < found <= {0, 11, 12, 13, 255}
    for part, number in [('train', 6), ('aug', 12), ('val', 7)]:
        folder = 'SegmentationClassAug' if part == 'aug' else 'SegmentationClass'
        prefix = dict(img_path='JPEGImages', seg_map_path=folder)
        options = dict(data_root=str(data / 'voc/VOCdevkit/VOC2012'), data_prefix=prefix)
        found = labels(PascalVOCDataset(ann_file=f'ImageSets/Segmentation/{part}.txt', **options), number)
        assert {0, 255} < found <= {0, 1, 2, 3, 255}


def test_videos(data):
    import_host_models('mmaction')
    from mmaction.datasets import VideoDataset

    root = data / 'ucf101'
    for split, number in [('train', 18), ('val', 7)]:
        ann_file = str(root / f'ucf101_{split}_split_1_videos.txt')
        dataset = VideoDataset(ann_file=ann_file, pipeline=[], data_prefix=dict(video=str(root / 'videos')))
        assert len(dataset) == number and {dataset.get_data_info(i)['label'] for i in range(number)} == {0, 1, 2}
    official = (root / 'ucfTrainTestlist/trainlist01.txt').read_text().splitlines()
    assert (
        official[0].split() == ['Circle/v_Circle_g08_c01.avi', '1']
        and (root / 'videos' / official[0].split()[0]).exists()
    )
    assert (root / 'ucfTrainTestlist/classInd.txt').read_text() == '1 Circle\n2 Square\n3 Triangle\n'


def test_images(data):
    import_host_models('mmpretrain')
    from mmpretrain.datasets import CustomDataset

    for split, number in [('train', 18), ('val', 7)]:
        dataset = CustomDataset(data_root=str(data / 'imagenet'), data_prefix=split)
        assert len(dataset) == number and list(dataset.CLASSES) == [f'n0000000{i}' for i in range(3)]
