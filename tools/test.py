"""Evaluate a checkpoint: python tools/test.py CONFIG CHECKPOINT [options]. Serves all four libraries' configs."""

from __future__ import annotations

import environment  # noqa: F401  (first: is this the right Python?)

# isort: split

from bnet_mm.cli import UserError, check_file, clear_errors, common_arguments, load_config, run_tool
from bnet_mm.engine.options import draw_predictions, dump_predictions, use_tta
from bnet_mm.engine.runner import build_runner, stops_clearly


def parse_args():
    parser = common_arguments('Evaluate a checkpoint')
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument('--show-dir', help='write pictures of the predictions to this folder below the work dir')
    parser.add_argument('--out', help='write the predictions to this .pkl file')
    parser.add_argument('--tta', action='store_true', help='test-time augmentation')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    cfg = load_config(args)
    if '://' not in args.checkpoint:
        check_file('checkpoint', args.checkpoint)
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
    with stops_clearly(runner, 'the test'):
        runner.test()


if __name__ == '__main__':
    run_tool(main)
