"""The hosts' inferencers with our configs, as tools/README.md says; tests/tools/test_predict.py has their results."""

import mmengine.hub
import numpy as np
import pytest
import torch

from bnet_mm.engine.runner import build_model
from helpers.hosts import import_host_models

IMAGE = np.random.default_rng(0).integers(0, 255, (64, 96, 3)).astype(np.uint8)


def config(name, **test_scale):
    cfg = mmengine.hub.get_config(f'bnet_mm::{name}.py')
    for step in cfg.test_dataloader.dataset.pipeline:
        step.update(test_scale if step.type.endswith('.Resize') or step.type == 'Resize' else {})
    return cfg


def complete(cfg, path):
    torch.save(dict(state_dict=build_model(cfg).state_dict()), path)
    return str(path)


def test_mmdet(tmp_path):
    """It takes the config as an object, not its name; and an incomplete checkpoint, which our tools refuse."""
    import_host_models('mmdet')
    from mmdet.apis import DetInferencer

    cfg = config('faster_rcnn_r50_bnet5_1x', scale=(96, 64))
    cfg.model.test_cfg.rcnn.score_thr = 0
    cfg.model.backbone.depth, cfg.model.neck.in_channels = 18, [64, 128, 256, 512]  # smaller
    options = dict(device='cpu', show_progress=False)
    (found,) = DetInferencer(cfg, complete(cfg, tmp_path / 'a.pth'), **options)(IMAGE)['predictions']
    assert len(found['labels']) > 0
    torch.save(dict(state_dict={'backbone.conv1.weight': torch.zeros(64, 3, 7, 7)}), tmp_path / 'less.pth')
    DetInferencer(cfg, str(tmp_path / 'less.pth'), **options)
    with pytest.raises(ValueError, match='Cannot find model: bnet_mm::'):
        DetInferencer('bnet_mm::faster_rcnn_r50_bnet5_1x', **options)


def test_mmseg(tmp_path):
    import_host_models('mmseg')
    from mmseg.apis import MMSegInferencer

    cfg = config('pspnet_r50_bnet3_40k_cityscapes', scale=(96, 64))
    assert MMSegInferencer(cfg, complete(cfg, tmp_path / 'a.pth'), device='cpu')(IMAGE)['predictions'].shape == (64, 96)


def test_mmpretrain(tmp_path):
    import_host_models('mmpretrain')
    from mmpretrain.apis import ImageClassificationInferencer

    cfg = config('resnet18_bnet3_imagenet')
    (found,) = ImageClassificationInferencer(cfg, complete(cfg, tmp_path / 'a.pth'), device='cpu')(IMAGE)
    assert found['pred_scores'].shape == (1000,)
