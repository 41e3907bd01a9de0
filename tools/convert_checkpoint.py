"""Convert a checkpoint: python tools/convert_checkpoint.py IN OUT [--backbone]

Without option, a released BNET checkpoint. Not needed for use, since the layers read the official layouts themselves;
it makes a file in our own layout and shows what became of every key. Writes nothing if a BNET key is left over.

With --backbone, a classifier's checkpoint (mmpretrain): its backbone alone, under the names that the other configs'
init_cfg=dict(type='Pretrained') reads.
"""

from __future__ import annotations

import environment  # noqa: F401  (first: is this the right Python?)

# isort: split

import argparse

from bnet_mm.checkpoint.convert import convert_file, write_backbone
from bnet_mm.cli import UserError, clear_errors, run_tool


def convert(source: str, target: str) -> None:
    result, left_out = convert_file(source, target)
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
        raise UserError(f'{len(result.unmatched)} keys unmatched; {target} was not written')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('source', metavar='IN', help="released checkpoint, or with --backbone a classifier's")
    parser.add_argument('target', metavar='OUT', help='file to write; must not exist')
    parser.add_argument('--backbone', action='store_true', help='write the backbone of a classifier alone')
    args = parser.parse_args()
    with clear_errors('nothing was written'):
        if args.backbone:
            kept, left_out = write_backbone(args.source, args.target)
            print(f'kept {len(kept)} tensors of the backbone; left out: {", ".join(left_out) or "none"}')
        else:
            convert(args.source, args.target)
    print(f'wrote {args.target}')


if __name__ == '__main__':
    run_tool(main)
