"""Train a model: python tools/train.py CONFIG [options]. Serves mmdet, mmseg, mmaction2 and mmpretrain configs."""

from __future__ import annotations

import importlib.util
import os

import torch
from mmengine.config import Config
from mmengine.runner import Runner

from bnet_mm.checkpoint.layouts import CheckpointError
from bnet_mm.launch import UserError, build_runner, clear_errors, common_arguments, load_config, resume_from, run_tool


def parse_args():
    parser = common_arguments('Train a model')
    parser.add_argument(
        '--resume', nargs='?', const='auto', metavar='CHECKPOINT',
        help='resume from CHECKPOINT, or from the latest one in the work dir',
    )  # fmt: skip
    parser.add_argument('--amp', action='store_true', help='automatic mixed precision (needs a GPU)')
    parser.add_argument(
        '--auto-scale-lr', action='store_true', help='scale the learning rate with the batch size over all GPUs'
    )
    return parser.parse_args()


def check_pretrained(node) -> None:
    """Refuse, before anything is built, a config whose pretrained weights are not there."""
    if isinstance(node, dict):
        path = node.get('checkpoint') if node.get('type') == 'Pretrained' else node.get('pretrained')  # mmaction
        reason = _missing(path) if isinstance(path, str) else ''
        if reason:
            raise UserError(
                f'pretrained weights {path}: {reason}. Put the file there, or name its folder in BNET_CHECKPOINTS, or '
                'train from scratch with --cfg-options model.backbone.init_cfg=None model.backbone.frozen_stages=-1 '
                'model.backbone.norm_eval=False (mmaction: model.backbone.pretrained=None)'
            )
        node = list(node.values())
    if isinstance(node, (list, tuple)):
        for child in node:
            check_pretrained(child)


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


def build_data(runner: Runner) -> None:
    """Build the data sets now: a missing folder or a wrong annotation file must not wait for the first epoch."""
    with clear_errors('the training data cannot be read'):
        try:
            images = len(runner.train_loop.dataloader.dataset)
        except ValueError as error:
            if 'need at least one array' not in str(error):  # numpy's words for mmengine's empty data set
                raise
            images = 0
        if images == 0:
            raise UserError(
                'the training data cannot be read: no image is left. Do the names in metainfo.classes occur in '
                'ann_file, and has any image an annotation?'
            )
    if runner._val_loop is not None:
        with clear_errors('the validation data cannot be read'):
            runner.val_loop  # noqa: B018


def main() -> None:
    args = parse_args()
    cfg = load_config(args)
    check_pretrained(cfg.model)
    resume_from(cfg, args.resume)
    if args.amp:
        use_amp(cfg)
    if args.auto_scale_lr:
        scale_lr(cfg)
    runner = build_runner(cfg, strict_loading=bool(cfg.get('resume')))
    build_data(runner)
    try:
        runner.train()
    except (CheckpointError, FileNotFoundError) as error:
        raise UserError(str(error)) from error


if __name__ == '__main__':
    run_tool(main)
