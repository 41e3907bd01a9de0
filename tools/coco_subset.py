"""Write a COCO annotation file with a few images of another: python tools/coco_subset.py IN OUT --images 8

For overfitting trials, where training and evaluation must see the same few images. Takes the first images that have
between one and --max-objects annotations, none of them crowds.
"""

from __future__ import annotations

import environment  # noqa: F401  (first: is this the right Python?)

# isort: split

import argparse
import json
import sys
from pathlib import Path

from bnet_mm.datasets.coco import subset
from bnet_mm.files import written


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('source', metavar='IN', type=Path, help='COCO annotation file')
    parser.add_argument('target', metavar='OUT', type=Path, help='file to write')
    parser.add_argument('--images', type=int, default=8)
    parser.add_argument('--max-objects', type=int, default=6)
    args = parser.parse_args()
    if args.target.exists():
        sys.exit(f'error: {args.target} exists already')
    try:
        result = subset(json.loads(args.source.read_text()), args.images, args.max_objects)
        with written(args.target) as temporary:
            temporary.write_text(json.dumps(result))
    except (OSError, ValueError, KeyError) as error:
        sys.exit(f'error: {args.source}: {error}')
    print(f'{args.target}: {len(result["images"])} images, {len(result["annotations"])} objects')


if __name__ == '__main__':
    main()
