"""What the options of tools/train.py and tools/test.py do to a config, and what is refused before anything is built."""

from __future__ import annotations

import copy
import importlib.util
import os

import torch
from mmengine.config import Config, ConfigDict
from mmengine.registry import METRICS, DefaultScope

from bnet_mm.cli import UserError
from bnet_mm.surgery.config import dicts_in, type_name


def check_pretrained(model: Config) -> None:
    """Refuse, before anything is built, the config of a model whose pretrained weights are not there."""
    for _, node in dicts_in(model):
        reads = type_name(node) in ('Pretrained', 'PretrainedInit', 'CheckedPretrainedInit')
        path = node.get('checkpoint') if reads else node.get('pretrained')  # mmaction
        reason = _missing(path) if isinstance(path, str) else ''
        if reason:
            raise UserError(
                f'pretrained weights {path}: {reason}. Put the file there, or name its folder in BNET_CHECKPOINTS, or '
                'train from scratch with --cfg-options model.backbone.init_cfg=None model.backbone.frozen_stages=-1 '
                'model.backbone.norm_eval=False (mmaction: model.backbone.pretrained=None)'
            )


def _missing(path: str) -> str:
    """What is missing for these pretrained weights; empty if nothing is, as far as can be seen without a download."""
    if path.startswith('torchvision://') and importlib.util.find_spec('torchvision') is None:
        return 'needs the torchvision package, which is not installed'
    if path and '://' not in path and not os.path.isfile(os.path.expanduser(path)):
        return 'does not exist'
    return ''


def use_amp(cfg: Config) -> None:
    if not torch.cuda.is_available():
        raise UserError('--amp needs a GPU, and torch finds none here')
    cfg.optim_wrapper.type = 'AmpOptimWrapper'
    cfg.optim_wrapper.setdefault('loss_scale', 'dynamic')


def scale_lr(cfg: Config) -> None:
    if 'base_batch_size' not in cfg.get('auto_scale_lr', {}):
        raise UserError('--auto-scale-lr: the config says no auto_scale_lr.base_batch_size')
    cfg.auto_scale_lr.enable = True


# The option that switches a library's visualization hook on.
DRAW_OPTION = {'mmdet': 'draw', 'mmseg': 'draw', 'mmaction': 'enable', 'mmpretrain': 'enable'}


def draw_predictions(cfg: Config, folder: str) -> None:
    hook = cfg.default_hooks.get('visualization')
    if hook is None or cfg.default_scope not in DRAW_OPTION:
        raise UserError('--show-dir: the config has no visualization hook')
    hook[DRAW_OPTION[cfg.default_scope]] = True
    hook.interval = 1
    if cfg.default_scope == 'mmdet':
        hook.test_out_dir = folder
    elif cfg.default_scope == 'mmseg':
        cfg.visualizer.save_dir = os.path.join(cfg.work_dir, folder)
    else:
        hook.out_dir = os.path.join(cfg.work_dir, folder)


def use_tta(cfg: Config) -> None:
    """Wrap the model for test-time augmentation; mmdet configs without it get a horizontal flip, as in mmdet."""
    dataset = cfg.test_dataloader.dataset
    while 'dataset' in dataset:
        dataset = dataset.dataset
    if cfg.default_scope == 'mmdet' and 'tta_model' not in cfg:
        cfg.tta_model = dict(type='DetTTAModel', tta_cfg=dict(nms=dict(type='nms', iou_threshold=0.5), max_per_img=100))
    if cfg.default_scope == 'mmdet' and 'tta_pipeline' not in cfg:
        pack = dict(dataset.pipeline[-1])
        if 'meta_keys' in pack:  # its default has the flips
            pack['meta_keys'] = (*pack['meta_keys'], 'flip', 'flip_direction')
        flips = [dict(type='RandomFlip', prob=1.0), dict(type='RandomFlip', prob=0.0)]
        cfg.tta_pipeline = copy.deepcopy(dataset.pipeline)
        cfg.tta_pipeline[-1] = dict(type='TestTimeAug', transforms=[flips, [pack]])
    if 'tta_model' not in cfg or 'tta_pipeline' not in cfg:
        raise UserError('--tta: the config says no tta_model and tta_pipeline')
    cfg.model = ConfigDict(**cfg.tta_model, module=cfg.model)
    dataset.pipeline = cfg.tta_pipeline


def dump_predictions(runner, scope: str, path: str) -> None:
    with DefaultScope.overwrite_default_scope(scope):
        metric = dict(type='DumpDetResults' if scope == 'mmdet' else 'DumpResults', out_file_path=path)
        runner.test_evaluator.metrics.append(METRICS.build(metric))
