"""Export a checkpoint to ONNX: python tools/export_onnx.py CONFIG CKPT OUT.onnx [--shape H W] [--cfg-options ...]

Of detectors like RetinaNet and Faster R-CNN all is exported, to the boxes in one image after non-maximum suppression
(outputs boxes, scores, labels); of other detectors, and with --features, backbone and neck (feat0, feat1, ...); of
segmentors the logits resized to the image, of 2D recognisers and classifiers the logits. The input, ``image``, is the
normalised batch after the data preprocessor: (N, 3, H, W), for recognisers (N, segments, 3, H, W). The norms are folded
first (bnet_mm.fold), so that a BNET layer is one depthwise Conv node. Batch, height and width are free where the model
allows it; where it does not, such as with PSPNet's adaptive pooling, height and width are those of --shape, and the
output says so.

The file is compared in onnxruntime with the model before folding, in two sizes; it is not written if they differ.
"""

from __future__ import annotations

import environment  # noqa: F401  (first: is this the right Python?)

# isort: split

import argparse

from bnet_mm.cli import Options, UserError, clear_errors, load_config, run_tool
from bnet_mm.engine.export import Exported, Preparation, check_packages, export_checked
from bnet_mm.engine.quantisation import quantise
from bnet_mm.engine.runner import build_model, load_complete
from bnet_mm.files import check_target, written
from bnet_mm.surgery import fold


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', metavar='CONFIG', help='config file, or library::path')
    parser.add_argument('checkpoint', metavar='CKPT', help='checkpoint file; must hold every tensor of the model')
    parser.add_argument('out', metavar='OUT.onnx', help='file to write; must not exist')
    parser.add_argument(
        '--shape',
        nargs=2,
        type=int,
        default=[256, 256],
        metavar=('H', 'W'),
        help='height and width in pixels (256 256)',
    )
    parser.add_argument('--fixed-size', action='store_true', help='no other height and width than those of --shape')
    parser.add_argument('--features', action='store_true', help='of a detector, backbone and neck only')
    parser.add_argument(
        '--images', nargs='+', default=[], metavar='FILE',
        help='pictures to compare on, scaled to --shape; without them noise, in which a trained detector finds nothing',
    )  # fmt: skip
    parser.add_argument(
        '--int8', action='store_true', help='quantised by half of --images; the change on the other half is printed'
    )
    parser.add_argument(
        '--cfg-options', nargs='+', action=Options, default={}, metavar='KEY=VALUE', help='override config values'
    )
    parser.set_defaults(work_dir=None, launcher='none', local_rank=0)
    args = parser.parse_args()
    if min(args.shape) < 1:
        raise UserError(f'--shape takes a positive height and width, got {args.shape[0]} {args.shape[1]}')
    if args.int8 and len(args.images) < 2:
        raise UserError(f'--int8 needs pictures like those of later, some dozens: --images, got {len(args.images)}')
    check_packages()
    with clear_errors('nothing was written'):
        check_target(args.out)
    model = build_model(load_config(args))
    load_complete(model, args.checkpoint)
    original = Exported(model, args.features)
    if args.features and not original.why_not_boxes:
        raise UserError(f'--features is for detectors, this is a {type(model).__name__}')
    pictures = original.read_pictures(args.images)
    report = fold(original.model, inplace=False)
    print(report.summary())
    for name, reason in report.kept.items():
        print(f'not folded: {name}: {reason}')
    if original.why_not_boxes:
        print(f'backbone and neck only: {original.why_not_boxes}')
    print(Preparation.of(original.model))
    with written(args.out) as temporary:
        export_checked(
            original, Exported(report.model, args.features), args.shape, str(temporary), args.fixed_size, pictures
        )
        if args.int8:
            print(quantise(original, str(temporary), args.shape, pictures))
    print(f'wrote {args.out}')


if __name__ == '__main__':
    run_tool(main)
