"""What models find in images and videos, as numbers, words and files (tools/predict.py)."""

from __future__ import annotations

import glob
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from mmengine.config import Config

from bnet_mm.cli import UserError
from bnet_mm.datasets.readers import PICTURES, list_files, pixels
from bnet_mm.files import written
from bnet_mm.visualization.inference import class_name

VIDEOS = ('.mp4', '.avi', '.mov', '.mkv', '.webm', '.m4v', '.mpg', '.mpeg')
WEBCAM_RATE = 10.0  # frames per second of what is recorded
TOP = 5  # classes of a classifier or recogniser


class Input(NamedTuple):
    """An image, a video or a webcam.

    source: Path, or the number of the webcam.
    name: Of what is written for it, below the folder given, if one was; without suffix where that suffices.
    """

    source: str | int
    name: str

    @property
    def is_image(self) -> bool:
        return isinstance(self.source, str) and self.source.lower().endswith(PICTURES)

    @property
    def is_video(self) -> bool:
        return isinstance(self.source, str) and self.source.lower().endswith(VIDEOS)


def find_inputs(words: list[str]) -> list[Input]:
    """Files, folders (with those below), patterns such as 'a/*.jpg', and numbers of webcams.

    Raises:
        UserError: For what does not exist or is neither image nor video, and for two inputs of the same name.
    """
    found: list[Input] = []
    for word in words:
        paths = [word] if Path(word).exists() else sorted(glob.glob(word, recursive=True))
        if word.isdecimal() and not paths:
            found.append(Input(int(word), f'webcam{word}'))
        elif not paths:
            raise UserError(f'{word} does not exist')
        for path in map(Path, paths):
            if path.is_dir():
                files = list_files(path, '.', PICTURES + VIDEOS)
                if not files and path == Path(word):
                    raise UserError(f'{path} has no images or videos')
                found += [Input(str(path / file), str(Path(file).with_suffix(''))) for file in files]
            elif path.suffix.lower() in PICTURES + VIDEOS:
                found.append(Input(str(path), path.stem))
            elif path == Path(word):
                raise UserError(f'{path} is neither an image ({" ".join(PICTURES)}) nor a video ({" ".join(VIDEOS)})')
    names = Counter(one.name for one in found)
    found = [
        one._replace(name=one.name + Path(str(one.source)).suffix) if names[one.name] > 1 else one for one in found
    ]
    first: dict[str, Input] = {}
    for one in found:
        if first.setdefault(one.name, one) is not one:
            raise UserError(f'{first[one.name].source} and {one.source} would both be {one.name}: give one of them')
    return found


def check_picture(one: Input) -> None:
    """Refuse a damaged image, where OpenCV fills in grey.

    Raises:
        UserError: As said.
    """
    if one.is_image:
        try:
            pixels(Path(str(one.source)))
        except ValueError as error:
            raise UserError(str(error)) from error


class Video:
    """Frames (H, W, 3), BGR, of a file or a webcam.

    Raises:
        UserError: If it cannot be opened.
    """

    def __init__(self, source: str | int) -> None:
        self.capture = cv2.VideoCapture(source)
        if not self.capture.isOpened():
            name = f'webcam {source}' if isinstance(source, int) else source
            raise UserError(f'{name} cannot be opened as a video')
        rate = self.capture.get(cv2.CAP_PROP_FPS)
        self.rate = rate if rate > 0 else WEBCAM_RATE  # webcams say 0 or -1
        self.frames = max(0, int(self.capture.get(cv2.CAP_PROP_FRAME_COUNT)))  # 0 where nobody knows

    def __iter__(self) -> Iterator[np.ndarray]:
        """Until its end or, of a webcam, until the user interrupts."""
        try:
            while (read := self.capture.read())[0]:
                yield read[1]
        finally:
            self.capture.release()


@contextmanager
def recorded(path: Path, rate: float) -> Iterator[Any]:
    """A function that appends a picture (H, W, 3), RGB, to the video ``path`` (.mp4), which is named at the end."""
    with written(path) as temporary:
        writers: list[cv2.VideoWriter] = []

        def add(picture: np.ndarray) -> None:
            if not writers:
                size = picture.shape[1], picture.shape[0]
                writers.append(cv2.VideoWriter(str(temporary), cv2.VideoWriter.fourcc(*'mp4v'), rate, size))
                if not writers[0].isOpened():
                    raise UserError(f'{path}: this OpenCV cannot write MPEG-4 videos')
            writers[0].write(picture[..., ::-1])

        try:
            yield add
        finally:
            for writer in writers:
                writer.release()


def as_numbers(cfg: Config, sample: Any, meta: dict, score: float) -> dict[str, Any]:
    """What was predicted, for JSON, under the names that the hosts' inferencers give it, and with names of classes.

    Masks are run lengths of COCO. Objects below ``score`` are left out.
    """
    if cfg.default_scope == 'mmdet':
        kept = sample.pred_instances[sample.pred_instances.scores >= score]
        result = {key: kept[key].tolist() for key in ('labels', 'scores', 'bboxes')}
        if 'masks' in kept:
            result['masks'] = [_run_lengths(mask) for mask in kept.masks.numpy()]
    elif cfg.default_scope == 'mmseg':
        classes = sample.pred_sem_seg.data[0].numpy()
        labels, counts = np.unique(classes, return_counts=True)
        result = dict(labels=labels.tolist(), shares=(counts / classes.size).tolist())
        result['masks'] = [_run_lengths(classes == label) for label in labels]
    else:
        scores, labels = sample.pred_score.topk(min(TOP, len(sample.pred_score)))
        result = dict(labels=labels.tolist(), scores=scores.tolist())
    return dict(result, classes=[class_name(meta, label) for label in result['labels']])


def _run_lengths(mask: np.ndarray) -> dict[str, Any]:
    from pycocotools.mask import encode

    coded = encode(np.asfortranarray(mask, np.uint8))
    return dict(coded, counts=coded['counts'].decode())


def in_words(numbers: dict[str, Any]) -> str:
    """The predictions in a line: '2 person, 1 dog', 'road 54%, car 10%' or 'cat 0.93; dog 0.05'."""
    classes = numbers['classes']
    if 'bboxes' in numbers:
        return ', '.join(f'{classes.count(name)} {name}' for name in dict.fromkeys(classes)) or 'nothing'
    if 'shares' in numbers:
        order = np.argsort(numbers['shares'])[::-1]
        return ', '.join(f'{classes[i]} {numbers["shares"][i]:.0%}' for i in order if numbers['shares'][i] >= 0.005)
    return '; '.join(f'{name} {score:.2f}' for name, score in zip(classes, numbers['scores']))
