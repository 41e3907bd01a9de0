"""Training curves of one or several runs: python tools/curves.py WORK_DIR [WORK_DIR ...] [--metric NAME] [--out DIR]

Writes curves.png, curves.svg and curves.csv: loss and metric over iterations and over the time spent training. Resumed
runs are joined; runs that differ in their seed only are one line, with a band of one standard deviation.
"""

from __future__ import annotations

import environment  # noqa: F401  (first: is this the right Python?)

# isort: split

import argparse
from pathlib import Path

from bnet_mm.cli import UserError, run_tool
from bnet_mm.files import make_folder, written
from bnet_mm.visualization.curves import draw_curves, write_csv
from bnet_mm.visualization.figures import save
from bnet_mm.visualization.runs import grouped, read_run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('runs', metavar='WORK_DIR', nargs='+', type=Path, help='work dir of tools/train.py')
    parser.add_argument('--metric', help='metric to draw, such as coco/bbox_mAP_50 (the first)')
    parser.add_argument('--out', type=Path, default=Path('curves'), help='folder for the files (curves)')
    args = parser.parse_args()
    groups = grouped([read_run(folder) for folder in args.runs])
    runs = [run for group in groups.values() for run in group]
    if without := [run.folder for run in runs if not len(run.loss().steps)]:
        raise UserError(f'no loss was logged below {without[0]}')
    metrics = list(dict.fromkeys(name for run in runs for name in run.metrics()))
    if args.metric and args.metric not in metrics:
        raise UserError(f'--metric {args.metric}: there is none; there are {", ".join(metrics) or "no metrics"}')
    make_folder(args.out)
    figure = draw_curves(groups, args.metric or next(iter(metrics), None))
    for suffix in ('png', 'svg'):
        save(figure, args.out / f'curves.{suffix}')
    with written(args.out / 'curves.csv') as temporary:
        write_csv(groups, metrics, temporary)
    print(f'{args.out}/curves.png, .svg and .csv')


if __name__ == '__main__':
    run_tool(main)
