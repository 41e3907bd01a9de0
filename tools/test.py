"""Evaluate a checkpoint: python tools/test.py CONFIG CHECKPOINT [options]. Serves all four libraries' configs."""

from __future__ import annotations

import copy
import os

from mmengine.config import Config, ConfigDict
from mmengine.registry import METRICS, DefaultScope

from bnet_mm.checkpoint.layouts import CheckpointError
from bnet_mm.launch import UserError, build_runner, clear_errors, common_arguments, load_config, run_tool

# The option that switches a library's visualization hook on.
DRAW_OPTION = {'mmdet': 'draw', 'mmseg': 'draw', 'mmaction': 'enable', 'mmpretrain': 'enable'}


def parse_args():
    parser = common_arguments('Evaluate a checkpoint')
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument('--show-dir', help='write pictures of the predictions to this folder below the work dir')
    parser.add_argument('--out', help='write the predictions to this .pkl file')
    parser.add_argument('--tta', action='store_true', help='test-time augmentation')
    return parser.parse_args()


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


def main() -> None:
    args = parse_args()
    cfg = load_config(args)
    if '://' not in args.checkpoint and not os.path.isfile(os.path.expanduser(args.checkpoint)):
        raise UserError(f'checkpoint {args.checkpoint} does not exist')
    if args.out and not args.out.endswith(('.pkl', '.pickle')):
        raise UserError(f'--out must name a .pkl file, got {args.out}')
    cfg.load_from, cfg.resume = args.checkpoint, False
    if args.show_dir:
        draw_predictions(cfg, args.show_dir)
    if args.tta:
        use_tta(cfg)
    runner = build_runner(cfg, strict_loading=True)
    with clear_errors('the test data cannot be read'):
        runner.test_loop  # noqa: B018
    if args.out:
        dump_predictions(runner, cfg.default_scope, args.out)
    try:
        runner.test()
    except (CheckpointError, FileNotFoundError) as error:
        raise UserError(str(error)) from error


if __name__ == '__main__':
    run_tool(main)
