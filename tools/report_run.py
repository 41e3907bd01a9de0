"""Show how a detection run went: python tools/report_run.py TRAIN_DIR TEST_DIR --out OUT

Prints the AP table of the latest test below TEST_DIR, and writes OUT/curves.png (loss and AP over the iterations of
TRAIN_DIR, resumed runs joined) and OUT/predictions.png (--show-dir pictures: ground truth left, predictions right).
"""

from __future__ import annotations

import environment  # noqa: F401  (first: is this the right Python?)

# isort: split

import argparse
import json
import sys
from pathlib import Path

import cv2
import matplotlib
import numpy as np
from rich.console import Console
from rich.table import Table

matplotlib.use('Agg')
import matplotlib.pyplot as plt  # noqa: E402


def read_scalars(train_dir: Path) -> list[dict]:
    """The lines that mmengine's LocalVisBackend wrote, over all runs in the work dir, oldest first."""
    files = sorted(train_dir.glob('*/vis_data/scalars.json'))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def latest_metrics(test_dir: Path) -> dict:
    """The metrics that the latest mmengine test run below ``test_dir`` wrote."""
    files = sorted(test_dir.glob('[0-9]*/[0-9]*.json'))
    if not files:
        sys.exit(f'error: no test result below {test_dir}; run tools/test.py CONFIG CHECKPOINT --work-dir {test_dir}')
    return json.loads(files[-1].read_text().splitlines()[-1])


def print_table(metrics: dict) -> None:
    table = Table('metric', 'value', title='COCO box AP')
    for name, value in metrics.items():
        if name.startswith('coco/') and isinstance(value, (int, float)):
            # pycocotools says -1 where there is nothing to find, such as no large object
            table.add_row(name.removeprefix('coco/'), f'{value:.3f}' if value >= 0 else 'no objects')
    Console(width=80).print(table)


def plot_curves(scalars: list[dict], path: Path) -> None:
    losses = sorted({line['step']: line['loss'] for line in scalars if 'loss' in line}.items())  # a resumed run repeats
    iterations = {line['epoch']: line['step'] for line in scalars if 'loss' in line}  # last logged one of an epoch
    epochs = {line['step']: line for line in scalars if 'coco/bbox_mAP_50' in line}
    points = [(iterations.get(epoch, epoch), line) for epoch, line in sorted(epochs.items())]
    figure, left = plt.subplots(figsize=(7, 4))
    left.plot(*zip(*losses), color='tab:blue', label='training loss')
    left.set(xlabel='iteration', ylabel='training loss (running mean)', ylim=(0, None))
    right = left.twinx()
    for name, style in (('coco/bbox_mAP_50', '-o'), ('coco/bbox_mAP', '--s')):
        values = [line[name] for _, line in points]
        right.plot([x for x, _ in points], values, style, color='tab:orange', markersize=4, label=name[5:])
    right.set(ylabel='AP', ylim=(0, 1))
    left.grid(alpha=0.3)
    figure.legend(loc='upper center', ncol=3, frameon=False)
    figure.savefig(path, dpi=120)


def picture_grid(pictures: list[Path], path: Path, columns: int = 2, height: int = 200) -> None:
    """One picture of several, each scaled to ``height`` pixels and padded to the widest."""
    images = [cv2.imread(str(picture)) for picture in pictures]
    images = [cv2.resize(image, (image.shape[1] * height // image.shape[0], height)) for image in images]
    width = max(image.shape[1] for image in images)
    cells = [np.pad(i, ((4, 4), (4, 4 + width - i.shape[1]), (0, 0)), constant_values=255) for i in images]
    cells += [np.full_like(cells[0], 255)] * (-len(cells) % columns)
    rows = [np.hstack(cells[i : i + columns]) for i in range(0, len(cells), columns)]
    cv2.imwrite(str(path), np.vstack(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('train_dir', type=Path, help='work dir of tools/train.py')
    parser.add_argument('test_dir', type=Path, help='work dir of tools/test.py')
    parser.add_argument('--out', type=Path, required=True, help='folder for the pictures')
    parser.add_argument('--images', type=int, default=8, help='pictures in the grid')
    args = parser.parse_args()
    scalars = read_scalars(args.train_dir)
    if not scalars:
        sys.exit(f'error: no training log below {args.train_dir}')
    metrics = latest_metrics(args.test_dir)
    args.out.mkdir(parents=True, exist_ok=True)
    plot_curves(scalars, args.out / 'curves.png')
    print_table(metrics)
    print(f'loss and AP curve:                  {args.out / "curves.png"}')
    found = sorted(args.test_dir.glob('[0-9]*'))[-1].rglob('*.*')
    pictures = sorted(path for path in found if path.suffix.lower() in ('.jpg', '.jpeg', '.png'))[: args.images]
    if pictures:
        picture_grid(pictures, args.out / 'predictions.png')
        print(f'ground truth (left) and predictions: {args.out / "predictions.png"}')


if __name__ == '__main__':
    main()
