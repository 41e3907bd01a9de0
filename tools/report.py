"""One page about runs, side by side: python tools/report.py RUN [RUN ...] --out DIR

RUN is a folder with the work dir of tools/train.py and, below it too, that of tools/test.py with its predictions
(--out RUN/predictions.pkl); runs that differ in their seed only are one column. Writes DIR/index.html, which opens from
the disk, and its pictures: metrics, curves, errors, detections, maps, taps, speed. What a run lacks is said there.
"""

from __future__ import annotations

import environment  # noqa: F401  (first: is this the right Python?)

# isort: split

import argparse
from pathlib import Path

from bnet_mm.cli import run_tool
from bnet_mm.visualization.report import build_report
from bnet_mm.visualization.runs import grouped, read_run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('runs', metavar='RUN', nargs='+', type=Path, help='folder of a run')
    parser.add_argument('--out', type=Path, required=True, help='folder for the page')
    args = parser.parse_args()
    print(build_report(grouped([read_run(folder) for folder in args.runs]), args.out))


if __name__ == '__main__':
    run_tool(main)
