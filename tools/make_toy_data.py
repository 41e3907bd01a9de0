"""Write a small seeded data set in a real layout: python tools/make_toy_data.py LAYOUT OUT [--train N] [--val N].

All show shapes on textured backgrounds, so that small models can learn them.
coco: instances (polygons, areas, boxes of what is visible; some images with a crowd, some with nothing) in
    train2017/, val2017/ and annotations/instances_{train,val}2017.json.
coco_occluded: the same with more shapes, which cover each other and are cut off by the border.
cityscapes: leftImg8bit/ and gtFine/*_labelTrainIds.png, one city each in train/ and val/.
voc: VOCdevkit/VOC2012 with JPEGImages/, SegmentationClass/, SegmentationClassAug/ and the lists train, aug, val.
ucf101: videos/<class>/v_<class>_gXX_cYY.avi of moving shapes; the official lists in ucfTrainTestlist/, and those that
    mmaction2 makes of them, ucf101_{train,val}_split_1_videos.txt.
imagenet: train/<wnid>/*.JPEG, val/<wnid>/*.JPEG and meta/{train,val}.txt.
"""

from __future__ import annotations

import environment  # noqa: F401  (first: is this the right Python?)

# isort: split

import argparse
from pathlib import Path

from bnet_mm.cli import UserError, run_tool
from bnet_mm.datasets.toy import CLASSES, LAYOUTS
from bnet_mm.files import make_folder, written


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('layout', choices=LAYOUTS, help='which layout, see above')
    parser.add_argument('out', type=Path, help='folder to make')
    parser.add_argument('--train', type=int, default=400, help='training images or videos (400)')
    parser.add_argument('--val', type=int, default=100, help='validation images or videos (100)')
    parser.add_argument('--size', type=int, default=192, help='height and width in pixels (192)')
    parser.add_argument('--seed', type=int, default=0, help='of all that is random (0)')
    args = parser.parse_args()
    if args.out.exists():
        raise UserError(f'{args.out} exists already; remove it or name another folder')
    if min(args.train, args.val) < 1 or args.size < 32 or args.seed < 0:
        raise UserError('--train and --val must be at least 1, --size at least 32, --seed at least 0')
    make_folder(args.out.parent)
    with written(args.out) as temporary:
        LAYOUTS[args.layout](temporary, dict(train=args.train, val=args.val), args.size, args.seed)
    print(
        f'{args.out}: {args.layout}, {args.train} for training and {args.val} for validation, of {", ".join(CLASSES)}'
    )


if __name__ == '__main__':
    run_tool(main)
