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

from mmengine.config import Config

from bnet_mm.cli import Options, UserError, clear_errors, load_config, run_tool
from bnet_mm.engine.runner import build_model, load_complete
from bnet_mm.files import written
from bnet_mm.layers import BNET
from bnet_mm.visualization.inference import drawn, infer
from bnet_mm.visualization.maps import default_layers, recorded_maps
from bnet_mm.visualization.strips import Row, heat_picture, strip

FRAMES = 4  # shown of a video
CAPTION = (
    'Enhancement: number of channels whose output lies above the regression line over in- and output of the taps. '
    'Attention: mean over channels of the squared activations. Red is the largest value of each map.'
)


class Shown:
    """A model whose maps are drawn."""

    def __init__(self, config: str, checkpoint: str, options: dict, layers: list[str]) -> None:
        self.cfg: Config = load_config(
            argparse.Namespace(config=config, cfg_options=options, work_dir=None, launcher='none', local_rank=0)
        )
        if self.cfg.model.get('test_cfg') and self.cfg.model.test_cfg.get('mode') == 'slide':
            self.cfg.model.test_cfg.mode = 'whole'  # the maps of a window are not those of the picture
        self.name = Path(config).stem
        self.model = build_model(self.cfg).eval()
        self.meta = load_complete(self.model, checkpoint).get('meta', {}).get('dataset_meta') or {}
        enhanced, stages = default_layers(self.model)
        self.layers = layers or [*enhanced, *stages]
        if not self.layers:
            raise UserError(f'{config}: no stages of residual blocks in this model; name layers with --layers')
        known = dict(self.model.named_modules())
        if unknown := [name for name in self.layers if name not in known]:
            raise UserError(f'{config}: the model has no {", ".join(unknown)}')
        self.enhanced = [name for name in self.layers if isinstance(known[name], BNET)]

    def rows(self, path: str) -> list[Row]:
        with clear_errors(f'{path} cannot be shown'), recorded_maps(self.model, self.layers) as maps:
            seen = infer(self.model, self.cfg, path)
            first = ('predictions', drawn(self.cfg, seen, self.meta))
        others = [name for name in self.layers if name not in self.enhanced]
        every = max(1, len(seen.pictures) // FRAMES)
        rows = []
        for frame in range(0, len(seen.pictures), every)[:FRAMES]:
            picture = seen.pictures[frame]
            for kind, names in (('enhancement', self.enhanced), ('attention', others)):
                cells = [(name, heat_picture(maps[name][frame], picture, seen.share)) for name in names]
                if cells:
                    input_cell = first if frame == 0 else (f'frame {frame}', picture)
                    rows.append(Row(f'{self.name}, {kind}', [input_cell, *cells]))
        return rows


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', metavar='CONFIG', help='config file')
    parser.add_argument('checkpoint', metavar='CHECKPOINT', help='checkpoint file; must hold every tensor of the model')
    parser.add_argument('images', metavar='IMAGES', nargs='+', help='images; of recognisers, videos')
    parser.add_argument(
        '--layers', nargs='+', default=['auto'], metavar='NAME',
        help='modules: of a BNET the enhancement map is drawn, of others the attention map (auto: of each stage, the '
        'last BNET and the whole)',
    )  # fmt: skip
    parser.add_argument('--out', type=Path, default=Path('heatmaps'), help='folder for the strips (heatmaps)')
    parser.add_argument('--compare', nargs=2, metavar=('CONFIG', 'CHECKPOINT'), help='another model, in rows below')
    parser.add_argument('--cfg-options', nargs='+', action=Options, default={}, metavar='KEY=VALUE')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if missing := [path for path in args.images if not Path(path).is_file()]:
        raise UserError(f'{missing[0]} does not exist')
    layers = [] if args.layers == ['auto'] else args.layers
    models = [Shown(*pair, args.cfg_options, layers) for pair in ([args.config, args.checkpoint], args.compare) if pair]
    args.out.mkdir(parents=True, exist_ok=True)
    for path in args.images:
        target = args.out / f'{Path(path).stem}.png'
        with written(target) as temporary:
            strip([row for model in models for row in model.rows(path)], CAPTION).savefig(temporary, dpi=150)
        print(target)


if __name__ == '__main__':
    run_tool(main)
