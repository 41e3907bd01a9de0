"""Prepare a config for your own images: python tools/my_data.py FOLDER --config CONFIG -o my_config.py

Looks for labels in FOLDER: COCO (annotation files), VOC (an XML file an image) and YOLO (a text file an image, boxes or
polygons) for detectors, masks (a PNG an image) for segmentors. Opens every image, says what is there and what is wrong
with it, and splits a fifth off for validation where there is no split. If all is well, it writes my_config.py, which
inherits from CONFIG, and my_config_data/ with the labels as OpenMMLab reads them (the images stay where they are), runs
one batch through it and prints the command that trains.
"""

from __future__ import annotations

import environment  # noqa: F401  (first: is this the right Python?)

# isort: split

import argparse
import shlex
import sys
from pathlib import Path

from mmengine.config import Config
from rich.progress import track

from bnet_mm.cli import UserError, base_from, clear_errors, read_base, run_tool
from bnet_mm.datasets.checker import SHOWN
from bnet_mm.datasets.custom.checks import look
from bnet_mm.datasets.custom.config import config_for, config_text, takes
from bnet_mm.datasets.custom.folder import SPLITS, Folder, Found
from bnet_mm.datasets.custom.formats import FORMATS, read
from bnet_mm.datasets.custom.output import fill_in_splits, write
from bnet_mm.datasets.custom.trial import dry_batch
from bnet_mm.engine.options import check_pretrained
from bnet_mm.files import check_target, written
from bnet_mm.messages import first_of


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder', metavar='FOLDER', type=Path, help='folder of images and labels')
    parser.add_argument('--format', choices=['auto', *FORMATS], default='auto', help='of the labels (auto)')
    parser.add_argument('--config', required=True, help='config file, or library::path, to inherit from')
    parser.add_argument('-o', '--out', metavar='NEW.py', required=True, help='config to write; must not exist')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if not args.out.endswith('.py'):
        raise UserError(f'-o {args.out}: a config file ends in .py')
    if not args.folder.is_dir():
        raise UserError(f'{args.folder} is not a folder')
    out = Path(args.out).resolve()
    data = out.with_name(f'{out.stem}_data')
    with clear_errors('nothing was written'):
        for path in (out, data):
            check_target(path)
    base = base_from(args.config, args.out)
    with clear_errors('nothing was written'), written(data) as temporary, written(out) as new:
        cfg = read_base(args.config, base, new)
        needed = takes(cfg)
        folder = Folder(args.folder.resolve())
        found = read(folder, args.format, needed)
        samples = track(found.samples, 'opening images', transient=True, disable=not sys.stdout.isatty())
        class_of = look(folder, found, samples)
        stop_at(found)
        fill_in_splits(found)
        describe(folder, found)
        write(folder, found, class_of, temporary)
        images = {split: len(found.of(split)) for split in SPLITS if found.of(split)}
        title = f'{args.config} for {folder.root}: {found.format}, {len(found.classes)} classes.'
        print('running one batch')
        for place in (temporary, data):  # the first for the trial, before it gets its name
            change = config_for(cfg, folder.root, place, found.classes, images)
            new.write_text(config_text(title, base, change))
            if place == temporary:
                losses = dry_batch(Config.fromfile(new))
    print(f'dry batch: {", ".join(f"{name} {value:.3g}" for name, value in losses.items())}')
    finish(args.out, Config.fromfile(out))


def stop_at(found: Found) -> None:
    """Print what is wrong, if anything is, and stop."""
    for problem in found.problems[:SHOWN]:
        print(f'error: {problem}', file=sys.stderr)
    if found.problems:
        count = f'{len(found.problems)} problem' + 's' * (len(found.problems) > 1)
        raise UserError(f'nothing was written: {count}')


def describe(folder: Folder, found: Found) -> None:
    objects = [one for sample in found.samples for one in sample.objects]
    with_masks = sum('segmentation' in one for one in objects)
    what = f'{len(objects)} objects, {with_masks} of them with masks' if objects else 'semantic masks'
    print(f'{folder.root}: {found.format}, {len(found.samples)} images, {what}')
    print(f'{len(found.classes)} classes: {first_of(found.classes, 20)}')
    for split in SPLITS:
        if samples := found.of(split):
            count = f', {sum(len(sample.objects) for sample in samples)} objects' if objects else ''
            print(f'{split}: {len(samples)} images{count}')
    for sentence in found.sentences():
        print(f'note: {sentence}')


def finish(name: str, cfg: Config) -> None:
    loop = cfg.train_cfg
    length = f'{loop.max_iters} iterations' if 'max_iters' in loop else f'{loop.max_epochs} epochs'
    print(
        f'wrote {name} and {Path(name).with_suffix("")}_data/: {length}, batch size {cfg.train_dataloader.batch_size}'
    )
    try:
        check_pretrained(cfg.model)
    except UserError as error:
        print(f'note: {error}')
    print(f'train it: python tools/train.py {shlex.quote(name)}')


if __name__ == '__main__':
    run_tool(main)
