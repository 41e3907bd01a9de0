"""The data sets of the configs, where they come from and what is missing: python tools/prepare_data.py NAME [ROOT]

Prints the sources, the commands that fetch, unpack and convert (the hosts' own, with their paths on this machine) and
the folders that the configs read. It changes and downloads nothing.

--check looks at the folder instead: the numbers of files against the published ones, every listed file, labels in
range, and some files of each part opened (images whole, masks and their values, objects of COCO, frames of videos). It
names what is missing and the command that makes it, and exits with 1. --any-size takes subsets and toy data as well.
"""

from __future__ import annotations

import environment  # noqa: F401  (first: is this the right Python?)

# isort: split

import argparse
import sys
from pathlib import Path

from bnet_mm.cli import UserError, run_tool
from bnet_mm.datasets.catalogue import DATA_SETS, describe
from bnet_mm.datasets.checker import SHOWN, check


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('name', choices=DATA_SETS, help='data set')
    parser.add_argument('root', nargs='?', type=Path, help='its folder; default: where the configs look')
    parser.add_argument('--check', action='store_true', help='look at the folder instead of printing how to make it')
    parser.add_argument('--any-size', action='store_true', help='do not compare numbers with the published ones')
    parser.add_argument('--open', type=int, default=20, metavar='N', help='open N files of each part (20)')
    args = parser.parse_args()
    if args.open < 0:
        raise UserError(f'--open takes a number from 0 on, got {args.open}')
    data = DATA_SETS[args.name]
    root = args.root or Path(data.root)
    if not args.check:
        if args.any_size:
            parser.error('--any-size goes with --check')
        return print(describe(args.name, root))
    if not root.is_dir():
        raise UserError(f'{root} is not a folder; how to make it: python {sys.argv[0]} {args.name} {root}')
    try:
        problems = check(data, root, args.any_size, args.open)
    except ModuleNotFoundError as error:
        raise UserError(f'{args.name} cannot be checked without {error.name}: pip install {error.name}') from error
    for problem in problems[:SHOWN]:
        print(f'error: {problem}', file=sys.stderr)
    if problems:
        sys.exit(f'error: {root} is not complete: {len(problems)} problems')
    print(f'{root} is complete' + ('' if args.any_size else ', with the published numbers'))


if __name__ == '__main__':
    run_tool(main)
