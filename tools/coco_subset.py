"""Write a COCO annotation file with a few images of another: python tools/coco_subset.py IN OUT --images 8

For overfitting trials, where training and evaluation must see the same few images. Takes the first images that have
between one and --max-objects annotations, none of them crowds.
"""

from __future__ import annotations

import environment  # noqa: F401  (first: is this the right Python?)

# isort: split

import argparse
import json
from pathlib import Path

from bnet_mm.cli import UserError, check_file, clear_errors, run_tool
from bnet_mm.datasets.coco import subset
from bnet_mm.files import check_target, written


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('source', metavar='IN', type=Path, help='COCO annotation file')
    parser.add_argument('target', metavar='OUT', type=Path, help='file to write; must not exist')
    parser.add_argument('--images', type=int, default=8, help='how many images (8)')
    parser.add_argument('--max-objects', type=int, default=6, help='most annotations of an image (6)')
    args = parser.parse_args()
    if min(args.images, args.max_objects) < 1:
        raise UserError('--images and --max-objects must be at least 1')
    with clear_errors('nothing was written'):
        check_target(args.target)
    check_file('annotation file', args.source)
    with clear_errors(f'{args.source} cannot be read as a COCO annotation file'):
        result = subset(json.loads(args.source.read_text()), args.images, args.max_objects)
    with written(args.target) as temporary:
        temporary.write_text(json.dumps(result))
    print(f'{args.target}: {len(result["images"])} images, {len(result["annotations"])} objects')


if __name__ == '__main__':
    run_tool(main)
