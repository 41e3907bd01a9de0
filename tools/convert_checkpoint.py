"""Convert a released BNET checkpoint: python tools/convert_checkpoint.py IN OUT

Not needed for use, since the layers read the official layouts themselves; it makes a file in our own layout and shows
what became of every key. Writes nothing and exits with 1 if a BNET key is left over.
"""

from __future__ import annotations

import argparse
import sys

from bnet_mm.checkpoint.convert import convert_file
from bnet_mm.checkpoint.layouts import CheckpointError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('source', metavar='IN', help='released checkpoint (ImageNet or detection)')
    parser.add_argument('target', metavar='OUT', help='file to write; must not exist')
    args = parser.parse_args()
    try:
        result, left_out = convert_file(args.source, args.target)
    except (CheckpointError, OSError) as error:
        sys.exit(f'error: {error}')
    print(f'renamed ({len(result.renamed)}):')
    for old, new in result.renamed.items():
        print(f'  {old} -> {new}')
    print(f'kept ({len(result.kept)}):')
    for name in result.kept:
        print(f'  {name}')
    print(f'unmatched ({len(result.unmatched)}):')
    for problem in result.unmatched:
        print(f'  {problem}')
    if left_out:
        print(f'not carried over, since they belong to the other training code: {", ".join(left_out)}')
    if result.unmatched:
        sys.exit(f'error: {len(result.unmatched)} keys unmatched; {args.target} was not written')
    print(f'wrote {args.target}')


if __name__ == '__main__':
    main()
