"""What a trained model finds: python tools/predict.py CONFIG CHECKPOINT INPUT... [--out DIR] [--score-thr T] [--json]

INPUT is an image, a video, a folder, a pattern such as 'photos/*.jpg' or the number of a webcam (until Ctrl-C).
Detectors, segmentors and classifiers take images and videos, of which they see every frame; recognisers take videos.
Writes pictures, and videos for videos, to DIR, and with --json what was found as DIR/<name>.json: a list of frames for
a video. Runs on the GPU if there is one. CONFIG is a file or a name, such as bnet_mm::faster_rcnn_r50_bnet5_1x; the
checkpoint must have every tensor of the model, and may be a released one.
"""

from __future__ import annotations

import environment  # noqa: F401  (first: is this the right Python?)

# isort: split

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from mmengine.device import get_device
from rich.progress import Progress

from bnet_mm.cli import Options, UserError, clear_errors, load_config, run_tool
from bnet_mm.files import make_folder, written
from bnet_mm.visualization.inference import drawn, infer, trained
from bnet_mm.visualization.predictions import Input, Video, as_numbers, check_picture, find_inputs, in_words, recorded


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', metavar='CONFIG', help='config file, or library::path')
    parser.add_argument('checkpoint', metavar='CHECKPOINT', help='checkpoint file; must hold every tensor of the model')
    parser.add_argument('inputs', metavar='INPUT', nargs='+', help='image, video, folder, pattern, number of a webcam')
    parser.add_argument('--out', type=Path, default=Path('predictions'), help='folder for the pictures (predictions)')
    parser.add_argument('--score-thr', type=float, default=0.3, metavar='T', help='least score of an object (0.3)')
    parser.add_argument('--json', action='store_true', help='write the predictions as numbers, too')
    parser.add_argument(
        '--cfg-options', nargs='+', action=Options, default={}, metavar='KEY=VALUE', help='override config values'
    )
    parser.set_defaults(work_dir=None, launcher='none', local_rank=0)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if not 0 <= args.score_thr <= 1:
        raise UserError(f'--score-thr is from 0 to 1, got {args.score_thr:g}')
    inputs = find_inputs(args.inputs)
    cfg = load_config(args)
    if cfg.default_scope == 'mmaction' and (others := [one.source for one in inputs if not one.is_video]):
        raise UserError(f'{others[0]} is no video, and {args.config} recognises actions in videos')
    model, meta = trained(cfg, args.checkpoint)
    model.to(get_device())

    def see(source: str | np.ndarray) -> tuple[np.ndarray, dict[str, Any]]:
        seen = infer(model, cfg, source)
        return drawn(cfg, seen, meta, args.score_thr), as_numbers(cfg, seen.sample, meta, args.score_thr)

    failed = 0
    with Progress(transient=True, disable=not sys.stdout.isatty()) as progress:
        for one in progress.track(inputs, description='predicting'):
            target = args.out / one.name
            try:
                with clear_errors(f'{one.source} cannot be predicted'):
                    make_folder(target.parent)
                    if one.is_image or cfg.default_scope == 'mmaction':
                        found = predict_whole(one, see, target)
                        print(f'{one.source}: {in_words(found)}')
                    else:
                        found = predict_frames(one, see, target, progress)
                        print(f'{one.source}: {len(found)} frames')
                    if args.json:
                        with written(target.with_name(f'{target.name}.json')) as temporary:
                            temporary.write_text(json.dumps(found))
            except UserError as error:
                print(f'error: {error}', file=sys.stderr)
                failed += 1
    if failed:
        raise UserError(f'{failed} of {len(inputs)} inputs could not be predicted')
    print(f'{len(inputs)} inputs, in {args.out}')


def predict_whole(one: Input, see: Callable, target: Path) -> dict[str, Any]:
    """An image, or a recogniser's video, which gives one picture."""
    check_picture(one)
    picture, numbers = see(one.source)
    with written(target.with_name(f'{target.name}.jpg')) as temporary:
        cv2.imwrite(str(temporary), picture[..., ::-1])
    return numbers


def predict_frames(one: Input, see: Callable, target: Path, progress: Progress) -> list[dict[str, Any]]:
    """Every frame of a video, or of a webcam until the user interrupts, as a video."""
    video, found = Video(one.source), []
    with recorded(target.with_name(f'{target.name}.mp4'), video.rate) as add:
        task = progress.add_task(one.name, total=video.frames or None)
        try:
            for frame in video:
                picture, numbers = see(frame)
                add(picture)
                found.append(numbers)
                progress.advance(task)
        except KeyboardInterrupt:
            if not isinstance(one.source, int):
                raise
    return found


if __name__ == '__main__':
    run_tool(main)
