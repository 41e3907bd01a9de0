"""What the taps of BNET learned: python tools/taps.py CHECKPOINT [--out DIR]

Prints a table of the layers, the share of tap energy (sum of squares) off the centre per stage, which is 0 in BN, and
writes DIR/taps.png: the most changed channels of each layer. Needs no config; released checkpoints will do.
"""

from __future__ import annotations

import environment  # noqa: F401  (first: is this the right Python?)

# isort: split

import argparse
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bnet_mm.checkpoint.safe_load import load_checkpoint_file
from bnet_mm.cli import UserError, clear_errors, run_tool
from bnet_mm.files import make_folder
from bnet_mm.visualization.figures import save
from bnet_mm.visualization.taps import draw_taps, stage_shares, tap_layers, tap_statistics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('checkpoint', metavar='CHECKPOINT', help='checkpoint file of a model with BNET')
    parser.add_argument('--out', type=Path, default=Path('taps'), help='folder for the picture (taps)')
    args = parser.parse_args()
    with clear_errors('nothing was drawn'):
        checkpoint = load_checkpoint_file(args.checkpoint, map_location='cpu')
        layers = tap_layers(checkpoint.get('state_dict', checkpoint))
    if not layers:
        raise UserError(f'{args.checkpoint} has no taps: no BNET with k > 1')
    rows = {name: tap_statistics(taps) for name, taps in layers.items()}
    table = Table('layer', 'channels', *next(iter(rows.values())), title='taps: shares of energy')
    for name, row in rows.items():
        table.add_row(
            name, str(len(layers[name])), *(f'{v}' if isinstance(v, int) else f'{v:.3f}' for v in row.values())
        )
    shares = Table('stage', 'energy off the centre')
    for stage, share in stage_shares(layers).items():
        shares.add_row(stage, f'{100 * share:.1f} %')
    console = Console(width=110)
    console.print(table)
    console.print(shares)
    make_folder(args.out)
    save(draw_taps(layers), args.out / 'taps.png')
    print(args.out / 'taps.png')


if __name__ == '__main__':
    run_tool(main)
