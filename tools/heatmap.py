"""What BNET enhances and where a model looks: python tools/heatmap.py CONFIG CHECKPOINT IMAGES... [--out DIR]

For each image, one strip: the input with the model's predictions; the enhancement maps of the last BNET of each stage,
which in a detector feed the feature pyramid (paper, Figure 4: H2 to H5); and the attention maps of the stages
(Figure 5). Detectors, segmentors and classifiers take images, recognisers videos, of which some frames are shown.
"""

from __future__ import annotations

import environment  # noqa: F401  (first: is this the right Python?)

# isort: split

import argparse
from pathlib import Path

from bnet_mm.cli import Options, UserError, load_config, run_tool
from bnet_mm.files import make_folder
from bnet_mm.visualization.figures import save
from bnet_mm.visualization.predictions import check_picture, find_inputs
from bnet_mm.visualization.shown import CAPTION, Shown
from bnet_mm.visualization.strips import strip


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', metavar='CONFIG', help='config file, or library::path')
    parser.add_argument('checkpoint', metavar='CHECKPOINT', help='checkpoint file; must hold every tensor of the model')
    parser.add_argument(
        'images', metavar='IMAGES', nargs='+', help='images, folders or patterns; of recognisers, videos'
    )
    parser.add_argument(
        '--layers', nargs='+', default=['auto'], metavar='NAME',
        help='modules: of a BNET the enhancement map is drawn, of others the attention map (auto: of each stage, the '
        'last BNET and the whole)',
    )  # fmt: skip
    parser.add_argument('--out', type=Path, default=Path('heatmaps'), help='folder for the strips (heatmaps)')
    parser.add_argument('--compare', nargs=2, metavar=('CONFIG', 'CHECKPOINT'), help='another model, in rows below')
    parser.add_argument(
        '--cfg-options', nargs='+', action=Options, default={}, metavar='KEY=VALUE', help='override config values'
    )
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    inputs = find_inputs(args.images)
    for one in inputs:
        if isinstance(one.source, int):
            raise UserError(f'IMAGES are files, got {one.source}')
        check_picture(one)
    layers = [] if args.layers == ['auto'] else args.layers
    models = []
    for config, checkpoint in filter(None, ([args.config, args.checkpoint], args.compare)):
        options = dict(cfg_options=args.cfg_options, work_dir=None, launcher='none', local_rank=0)
        cfg = load_config(argparse.Namespace(config=config, **options))
        models.append(Shown(Path(config).stem, cfg, checkpoint, layers))
    for one in inputs:
        target = args.out / f'{one.name}.png'
        make_folder(target.parent)
        save(strip([row for model in models for row in model.rows(one.source)], CAPTION), target)
        print(target)


if __name__ == '__main__':
    run_tool(main)
