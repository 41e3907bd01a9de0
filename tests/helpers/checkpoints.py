"""Narrow models, and all ways to load a checkpoint into them."""

import torch
from mmengine.config import Config
from mmengine.registry import MODELS
from mmengine.runner import load_checkpoint

from helpers import official_layouts as official
from helpers.paths import REPO

WIDTH = 8


def backbone_cfg(depth=50, k=5, bnet=True, **options):
    cfg = dict(type='ResNet', depth=depth, base_channels=WIDTH, stem_channels=WIDTH, **options)
    return dict(cfg, type='WithBNET', base='ResNet', bnet=dict(k=k)) if bnet else cfg


def detector_cfg(k=5, bnet=True, num_classes=80):
    """The Faster R-CNN of the configs, narrow."""
    cfg = Config.fromfile(f'{REPO}/configs/faster_rcnn_r50_bnet5_1x.py')
    model = cfg.model
    model.backbone = Config(dict(a=backbone_cfg(k=k, bnet=bnet, frozen_stages=1, norm_eval=True, init_cfg=None))).a
    channels = [WIDTH * 4 * 2**i for i in range(4)]
    model.neck.update(in_channels=channels, out_channels=16)
    model.rpn_head.update(in_channels=16, feat_channels=16)
    model.roi_head.bbox_roi_extractor.out_channels = 16
    model.roi_head.bbox_head.update(in_channels=16, fc_out_channels=32, num_classes=num_classes)
    model.test_cfg.rcnn.score_thr = 0.0
    return cfg


def save(checkpoint, path, legacy=False):
    if legacy:
        official.save_legacy(checkpoint, path)
    else:
        torch.save(checkpoint, path)
    return str(path)


def by_load_state_dict(cfg, path):
    from bnet_mm.checkpoint.safe_load import load_checkpoint_file

    model = MODELS.build(cfg)
    model.load_state_dict(load_checkpoint_file(path)['state_dict'], strict=False)
    return model


def by_mmengine(cfg, path):
    """What Runner does for load_from, resume and test."""
    model = MODELS.build(cfg)
    load_checkpoint(model, path, map_location='cpu')
    return model


def by_pretrained(cfg, path):
    model = MODELS.build(dict(cfg, init_cfg=dict(type='Pretrained', checkpoint=path)))
    model.init_weights()
    return model


WAYS = [by_load_state_dict, by_mmengine, by_pretrained]
