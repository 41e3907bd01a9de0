"""What a config for a user's data changes."""

import pytest
from mmengine.config import Config

from bnet_mm.cli import UserError
from bnet_mm.datasets.custom.config import config_for, config_text, over, schedule, takes, with_classes
from helpers.configs import load

DETECTORS = ['faster_rcnn_r50_bnet5_1x', 'mask_rcnn_r50_bnet5_1x', 'retinanet_r101_bnet5_1x']
SEGMENTORS = ['pspnet_r50_bnet3_40k_cityscapes', 'deeplabv3_r101_bnet3_voc12aug']


@pytest.mark.parametrize('name, needed', [
    ('faster_rcnn_r50_bnet5_1x', 'boxes'), ('mask_rcnn_r50_bnet5_1x', 'objects'),
    ('pspnet_r50_bnet3_40k_cityscapes', 'masks'),
])  # fmt: skip
def test_what_a_config_takes(name, needed):
    assert takes(load(name)) == needed


@pytest.mark.parametrize(
    'name, scope', [('resnet50_bnet3_imagenet', 'mmpretrain'), ('tsn_r50_bnet3_ucf101', 'mmaction')]
)
def test_what_it_does_not(name, scope):
    with pytest.raises(UserError, match=f'the config is for {scope}; data are prepared for detectors'):
        takes(load(name))


def test_classes_of_a_model():
    model = dict(head=dict(num_classes=80, depth=3), parts=[dict(bbox=dict(num_classes=80), k=1), dict(k=2)], k=4)
    assert with_classes(model, 5) == dict(
        head=dict(num_classes=5), parts=[dict(bbox=dict(num_classes=5), k=1), dict(k=2)]
    )
    assert model['parts'][0]['bbox']['num_classes'] == 80


def new_config(name, tmp_path, images, count=3):
    """The config that inherits from one of ours, read from its file."""
    base = load(name)
    classes = ['traffic light', "'s", 'x'][:count]
    change = config_for(base, tmp_path / 'images', tmp_path / 'data', classes, images)
    path = tmp_path / 'new.py'
    path.write_text(config_text('a title', f'bnet_mm::{name}.py', change))
    return base, Config.fromfile(path)


@pytest.mark.parametrize('name', DETECTORS)
def test_detector(name, tmp_path):
    base, cfg = new_config(name, tmp_path, dict(train=100, val=20))
    heads = [cfg.model.get('bbox_head'), *(cfg.model.get('roi_head') or {}).values()]
    assert {head.num_classes for head in heads if head and 'num_classes' in head} == {3}
    assert cfg.model.backbone == base.model.backbone
    for part, split in (('train', 'train'), ('val', 'val'), ('test', 'val')):
        dataset = cfg[f'{part}_dataloader'].dataset
        assert dataset.ann_file == str(tmp_path / f'data/{split}.json') and dataset.data_prefix == dict(img='')
        assert dataset.metainfo == dict(classes=('traffic light', "'s", 'x'))
        assert dataset.pipeline == base[f'{part}_dataloader'].dataset.pipeline
    assert cfg.val_evaluator.ann_file == cfg.test_evaluator.ann_file == str(tmp_path / 'data/val.json')
    assert cfg.val_evaluator.metric == base.val_evaluator.metric
    assert cfg.auto_scale_lr == dict(enable=True, base_batch_size=16) and cfg.train_dataloader.batch_size == 2
    assert cfg.train_cfg.max_epochs == 100 and cfg.train_cfg.val_interval == 8
    steps = [one for one in cfg.param_scheduler if one.by_epoch]
    assert [(one.milestones, one.end) for one in steps] == [([67, 92], 100)]
    (warm_up,) = [one for one in cfg.param_scheduler if not one.by_epoch]
    assert dict(warm_up, _scope_='mmdet') == base.param_scheduler[0]


@pytest.mark.parametrize('name', SEGMENTORS)
def test_segmentor(name, tmp_path):
    base, cfg = new_config(name, tmp_path, dict(train=30, val=5, test=4))
    assert cfg.model.decode_head.num_classes == cfg.model.auxiliary_head.num_classes == 3
    for part in ('train', 'val', 'test'):
        dataset = cfg[f'{part}_dataloader'].dataset
        assert (dataset.type, dataset.ann_file) == ('BaseSegDataset', str(tmp_path / f'data/{part}.txt'))
        assert dataset.data_prefix == dict(img_path='', seg_map_path=str(tmp_path / 'data/masks'))
        assert dataset.pipeline[-1].type == 'PackSegInputs' and '_delete_' not in dataset and 'datasets' not in dataset
    assert cfg.val_evaluator == base.val_evaluator
    assert cfg.train_cfg.max_iters == 5000 and cfg.train_cfg.val_interval == base.train_cfg.val_interval // 8
    assert cfg.param_scheduler[0].end == 5000 and cfg.default_hooks.checkpoint.interval == 500


@pytest.mark.parametrize('images, batch, epochs', [(100000, 2, 12), (1000, 2, 12), (500, 2, 20), (1, 1, 5000)])
def test_length_of_a_training_by_epochs(images, batch, epochs, tmp_path):
    _, cfg = new_config('faster_rcnn_r50_bnet5_1x', tmp_path, dict(train=images, val=1))
    assert cfg.train_cfg.max_epochs == epochs and cfg.train_dataloader.batch_size == batch


@pytest.mark.parametrize('steps, iterations', [(1, 5000), (50, 5000), (200, 20000), (9999, 40000)])
def test_length_of_a_training_by_iterations(steps, iterations):
    cfg = Config(dict(train_cfg=dict(max_iters=40000), param_scheduler=dict(type='PolyLR', end=40000, by_epoch=False)))
    change = schedule(cfg, steps)
    if iterations == 40000:
        assert change == {}
    else:
        assert change['train_cfg'] == dict(max_iters=iterations)
        assert change['param_scheduler'] == [dict(type='PolyLR', end=iterations, by_epoch=False)]


def test_data_set_of_another_kind_goes():
    base = dict(type='RepeatDataset', times=3, dataset=dict(type='VOCDataset', pipeline=[1]))
    new = dict(type='CocoDataset', metainfo=dict(classes=('a',)))
    assert over(base, dict(new)) == dict(new, _delete_=True, pipeline=[1])
    assert over(dict(type='VOCDataset', pipeline=[1]), dict(new)) == new
    assert over(dict(type='VOCMetric'), dict(type='CocoMetric')) == dict(type='CocoMetric', _delete_=True)
