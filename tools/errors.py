"""Which errors detectors make: python tools/errors.py ANNOTATIONS PREDICTIONS [PREDICTIONS ...] [--out DIR]

PREDICTIONS are files of tools/test.py --out, or COCO results (.json). Prints AP at IoU 0.5 and TIDE's errors with the
differences to the first model, and writes errors.png, errors.csv, precision_recall.png and, where the images are found,
pictures of ground truth and detections beside each other, those where the models differ most first.
"""

from __future__ import annotations

import environment  # noqa: F401  (first: is this the right Python?)

# isort: split

import argparse
import csv
from pathlib import Path

import mmcv
from rich.console import Console
from rich.table import Table

from bnet_mm.cli import UserError, run_tool
from bnet_mm.files import make_folder, written
from bnet_mm.visualization.detections import (
    draw_precision_recall,
    evaluated,
    matches,
    read_annotations,
    read_detections,
)
from bnet_mm.visualization.errors import draw_errors, error_rows, tide_errors
from bnet_mm.visualization.figures import save
from bnet_mm.visualization.side_by_side import SCORE, by_difference, draw_side_by_side


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('annotations', metavar='ANNOTATIONS', type=Path, help='COCO annotation file')
    parser.add_argument('predictions', metavar='PREDICTIONS', nargs='+', type=Path, help='predictions of each model')
    parser.add_argument('--names', nargs='+', help="the models' names (those of the files)")
    parser.add_argument('--masks', action='store_true', help='compare masks, not boxes')
    parser.add_argument('--images', type=Path, help='folder of the images (where tools/test.py found them)')
    parser.add_argument('--pictures', type=int, default=8, help='images to draw (8)')
    parser.add_argument('--out', type=Path, default=Path('errors'), help='folder for the files (errors)')
    return parser.parse_args()


def print_table(errors: dict[str, dict[str, float]]) -> None:
    table = Table('model', *next(iter(errors.values())), title='AP at IoU 0.5 and what errors cost of it, %')
    for row in error_rows(errors):
        table.add_row(*row)
    Console(width=140).print(table)


def main() -> None:
    args = parse_args()
    names = args.names or [path.stem for path in args.predictions]
    if len(set(names)) != len(args.predictions):
        raise UserError(f'the models need names of their own, got {", ".join(names)}: --names NAME NAME')
    if args.pictures < 0:
        raise UserError(f'--pictures takes a number from 0 on, got {args.pictures}')
    if args.images and not args.images.is_dir():
        raise UserError(f'--images {args.images} is not a folder')
    truth = read_annotations(args.annotations)
    found, files = {}, {}
    for name, path in zip(names, args.predictions):
        found[name], of_model = read_detections(path, truth, args.masks)
        files.update(of_model)
    if args.images:
        files = {image: args.images / one['file_name'] for image, one in truth.imgs.items()}
    errors = tide_errors(truth, found, args.masks)
    print_table(errors)
    evaluations = {name: evaluated(truth, detections, args.masks) for name, detections in found.items()}
    make_folder(args.out)
    with written(args.out / 'errors.csv') as temporary, open(temporary, 'w', newline='') as file:
        writer = csv.DictWriter(file, ['model', *next(iter(errors.values()))])
        writer.writeheader()
        writer.writerows(dict(row, model=name) for name, row in errors.items())
    save(draw_errors(errors), args.out / 'errors.png')
    save(draw_precision_recall(evaluations), args.out / 'precision_recall.png')
    matched = {name: matches(evaluation, SCORE) for name, evaluation in evaluations.items()}
    there = [image for image, _ in by_difference(matched) if image in files and Path(files[image]).is_file()]
    for rank, image in enumerate(there[: args.pictures], 1):
        picture = mmcv.imread(files[image], channel_order='rgb')
        figure = draw_side_by_side(evaluations, matched, image, picture)
        save(figure, args.out / f'{rank:02d}_{Path(files[image]).stem}.png')
    print(f'{args.out}: errors.png, errors.csv, precision_recall.png and {len(there[: args.pictures])} images')


if __name__ == '__main__':
    run_tool(main)
