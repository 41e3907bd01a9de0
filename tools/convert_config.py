"""Write the BNET version of any mm config: python tools/convert_config.py CONFIG -o NEW.py --k 5 --where C

NEW.py inherits from CONFIG (a file, or a name such as mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py) and turns its
model into the same model with BNET, whose norms are listed. --from-checkpoint BN.pth writes the matching checkpoint,
NEW.pth, which computes what BN.pth does in the original model.
"""

from __future__ import annotations

import environment  # noqa: F401  (first: is this the right Python?)

# isort: split

import argparse
from pathlib import Path

from mmengine.config import Config

from bnet_mm.checkpoint.convert import write_checkpoint
from bnet_mm.cli import UserError, base_from, clear_errors, read_base, run_tool
from bnet_mm.engine.runner import build_model, load_complete
from bnet_mm.files import check_target, written
from bnet_mm.surgery import enhance
from bnet_mm.surgery.config import config_text, inherited_names


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('config', metavar='CONFIG', help='config file, or library::path as in _base_')
    parser.add_argument('-o', '--out', metavar='NEW.py', required=True, help='config to write; must not exist')
    parser.add_argument('--k', type=int, default=3, help='size of the depthwise kernel, odd (3)')
    parser.add_argument('--where', default='C', help="positions (C, AC, ...), 'all', or a regular expression (C)")
    parser.add_argument('--dilation', type=int, default=1, help='spacing of the taps (1)')
    parser.add_argument('--from-checkpoint', metavar='BN.pth', help="checkpoint of CONFIG's model; writes NEW.pth")
    args = parser.parse_args()
    if not args.out.endswith('.py'):
        raise UserError(f'-o {args.out}: a config file ends in .py')
    if args.k < 1 or args.k % 2 == 0:
        raise UserError(f'--k must be a positive odd integer, got {args.k}')
    new_checkpoint = f'{args.out[:-3]}.pth'
    with clear_errors('nothing was written'):
        for path in (args.out, new_checkpoint) if args.from_checkpoint else (args.out,):
            check_target(path)
    base = base_from(args.config, args.out)
    bnet = dict(k=args.k, where=args.where, dilation=args.dilation)
    stem = Path(args.out).stem
    with clear_errors('nothing was written'), written(args.out) as temporary:
        cfg = read_base(args.config, base, temporary)
        checkpoint = Path(new_checkpoint).name if args.from_checkpoint else None
        try:
            text = config_text(cfg, args.config, base, bnet, stem, checkpoint)
        except ValueError as error:
            raise UserError(str(error)) from error
        temporary.write_text(text)
        model = build_model(cfg)
        with clear_errors('nothing was written'):
            report = enhance(model, **bnet)
            new_cfg = Config.fromfile(temporary)
        if args.from_checkpoint:
            meta = load_complete(model, args.from_checkpoint).get('meta', {})
            meta = {**meta, 'converted_from': Path(args.from_checkpoint).name}
            write_checkpoint(new_checkpoint, {'meta': meta, 'state_dict': model.state_dict()})
    print(report)
    print(f'wrote {args.out}' + (f' and {new_checkpoint}' if args.from_checkpoint else ''))
    if cfg.get('work_dir'):
        print(f'work_dir is {new_cfg.work_dir}, since that of {args.config} is {cfg.work_dir}')
    for key, value in inherited_names(new_cfg).items():
        if key != 'load_from' or not args.from_checkpoint:
            print(f'inherited from {args.config}: {key} = {value!r}; is it meant for this run, too?')
    if args.from_checkpoint:
        print(f'its figures must be those of {args.from_checkpoint}: python tools/test.py {args.out} {new_checkpoint}')


if __name__ == '__main__':
    run_tool(main)
