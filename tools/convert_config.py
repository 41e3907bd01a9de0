"""Write the BNET version of any mm config: python tools/convert_config.py CONFIG -o NEW.py --k 5 --where C

NEW.py inherits from CONFIG (a file, or a name such as mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py) and turns its
model into the same model with BNET, whose norms are listed. --from-checkpoint BN.pth writes the matching checkpoint,
NEW.pth, which computes what BN.pth does in the original model.
"""

from __future__ import annotations

import environment  # noqa: F401  (first: is this the right Python?)

# isort: split

import argparse
import difflib
import os
from importlib.util import find_spec
from pathlib import Path

from mmengine.config import Config

from bnet_mm.checkpoint.convert import write_checkpoint
from bnet_mm.cli import UserError, clear_errors, run_tool
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
    if '::' not in args.config and not os.path.isfile(args.config):
        raise UserError(f'config {args.config} does not exist')
    base = args.config
    if '::' not in base:
        base = os.path.relpath(base, os.path.dirname(os.path.abspath(args.out)))
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


def read_base(title: str, base: str, temporary: Path) -> Config:
    """The config that the new one inherits from, as ``_base_`` finds it from where the new one will stand."""
    library, _, name = title.partition('::')
    if name and find_spec(library) is None:
        raise UserError(f'config {title}: {library} is not installed')
    if name:
        configs = Path(find_spec(library).submodule_search_locations[0]) / '.mim' / 'configs'
        known = [path.relative_to(configs).as_posix() for path in configs.rglob('*.py')]
        if known and f'{name.removesuffix(".py")}.py' not in known:
            close = [f'{library}::{one}' for one in difflib.get_close_matches(name, known, n=3, cutoff=0)]
            raise UserError(f'{library} has no config {name}; the nearest are {", ".join(close)}')
    temporary.write_text(f'_base_ = {base!r}\n')
    with clear_errors(f'config {title} cannot be inherited from'):
        # A new-style config cannot be inherited from in this way; config_text says so.
        new_style = not name and Config._is_lazy_import(title)
        return Config.fromfile(title if new_style else temporary)


if __name__ == '__main__':
    run_tool(main)
