"""Train a model: python tools/train.py CONFIG [options]. Serves mmdet, mmseg, mmaction2 and mmpretrain configs."""

from __future__ import annotations

import environment  # noqa: F401  (first: is this the right Python?)

# isort: split

from bnet_mm.cli import common_arguments, load_config, run_tool
from bnet_mm.engine.options import check_pretrained, scale_lr, use_amp
from bnet_mm.engine.runner import build_data, build_runner, resume_from, stops_clearly


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
    with stops_clearly(runner, 'the training'):
        runner.train()


if __name__ == '__main__':
    run_tool(main)
