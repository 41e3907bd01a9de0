"""Detections against COCO annotations: reading, matching and precision-recall curves, all by pycocotools."""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Iterable, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from bnet_mm.cli import UserError, clear_errors

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIZES = ('all', 'small', 'medium', 'large')  # pycocotools' areaRng, in its order
MOST_CLASSES = 12  # with a plot of their own


def read_annotations(path: Path) -> COCO:
    """pycocotools' index of an annotation file, without what it prints."""
    with clear_errors(f'annotations {path} cannot be read'), redirect_stdout(io.StringIO()):
        return COCO(str(path))


def read_detections(path: Path, truth: COCO, masks: bool = False) -> tuple[list[dict[str, Any]], dict[int, str]]:
    """Predictions of tools/test.py --out (.pkl), or COCO's results (.json).

    The labels of a .pkl count the categories of the annotations in the order of their ids, as mmdet's CocoDataset does
    for classes in that order.

    Returns:
        A list in COCO's results format, and the image files by image id, empty for .json.

    Raises:
        UserError: If the file is neither, has no detections of these images, or lacks what is to be compared.
    """
    with clear_errors(f'predictions {path} cannot be read'):
        if path.suffix == '.json':
            found, files = json.loads(path.read_text()), {}
        else:
            samples = pickle.loads(path.read_bytes())  # the user's own, written by tools/test.py
            files = {sample['img_id']: sample['img_path'] for sample in samples}
            categories = sorted(truth.getCatIds())
            found = [one for sample in samples for one in _in_coco_format(sample, categories)]
        found = [one for one in found if one['image_id'] in truth.imgs]
    if not found:
        raise UserError(f'predictions {path} have no detections of images in the annotations')
    needed = ('category_id', 'score', 'segmentation' if masks else 'bbox')
    if lacking := [name for name in needed if any(name not in one for one in found)]:
        raise UserError(f'predictions {path} have no {", ".join(lacking)}')
    return found, files


def _in_coco_format(sample: dict, categories: list[int]) -> Iterable[dict]:
    predicted = sample['pred_instances']
    for i, (label, score) in enumerate(zip(predicted['labels'].tolist(), predicted['scores'].tolist())):
        left, top, right, bottom = predicted['bboxes'][i].tolist()
        one = dict(image_id=sample['img_id'], category_id=categories[label], score=score)
        one['bbox'] = [left, top, right - left, bottom - top]
        if 'masks' in predicted:
            one['segmentation'] = predicted['masks'][i]
        yield one


def evaluated(truth: COCO, detections: list[dict], masks: bool = False) -> COCOeval:
    """COCO's evaluation of boxes, or of masks, after ``accumulate``."""
    with redirect_stdout(io.StringIO()):
        # loadRes takes the box of the mask where a result has both, so it gets what is compared
        keys = ('image_id', 'category_id', 'score', 'segmentation' if masks else 'bbox')
        results = truth.loadRes([{key: one[key] for key in keys} for one in detections])
        evaluation = COCOeval(truth, results, 'segm' if masks else 'bbox')
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation


@dataclass
class Matches:
    """What became of the objects and detections of an image at IoU 0.5.

    found, missed: Ids of annotations (crowds left out).
    right, false: Ids of detections; those that only fit a crowd are neither.
    """

    found: set[int]
    missed: set[int]
    right: set[int]
    false: set[int]


def matches(evaluation: COCOeval, score: float) -> dict[int, Matches]:
    """COCO's own matches of each image, of detections with at least this score."""
    images = {image: Matches(set(), set(), set(), set()) for image in evaluation.params.imgIds}
    for one in evaluation.evalImgs:
        if one is None or one['aRng'] != evaluation.params.areaRng[0]:
            continue
        scores = dict(zip(one['dtIds'], one['dtScores']))
        image = images[one['image_id']]
        for annotation, ignored, detection in zip(one['gtIds'], one['gtIgnore'], one['gtMatches'][0]):
            if not ignored:
                hit = detection > 0 and scores[int(detection)] >= score
                (image.found if hit else image.missed).add(annotation)
        for detection, ignored, annotation in zip(one['dtIds'], one['dtIgnore'][0], one['dtMatches'][0]):
            if not ignored and scores[detection] >= score:
                (image.right if annotation > 0 else image.false).add(detection)
    return images


def draw_precision_recall(evaluations: Mapping[str, COCOeval]) -> Figure:
    """Precision over recall at IoU 0.5: means over the classes by size of the object, and each class at all sizes."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    first = next(iter(evaluations.values()))
    names = [first.cocoGt.cats[category]['name'] for category in first.params.catIds][:MOST_CLASSES]
    panels = [(f'{size} objects', slice(None), i) for i, size in enumerate(SIZES)]
    panels += [(name, slice(k, k + 1), 0) for k, name in enumerate(names)]
    rows = -(-len(panels) // 4)
    figure = Figure(figsize=(11, 2.5 * rows + 0.4), layout='constrained')
    for axis in (axes := figure.subplots(rows, 4, squeeze=False).ravel())[len(panels) :]:
        axis.set_visible(False)
    for axis, (title, classes, size) in zip(axes, panels):
        for i, evaluation in enumerate(evaluations.values()):
            precision = evaluation.eval['precision'][0, :, classes, size, -1]
            precision = precision[:, (precision > -1).all(0)]  # classes without such an object have -1
            if precision.size:
                axis.plot(evaluation.params.recThrs, precision.mean(1), color=f'C{i}', label=f'{precision.mean():.3f}')
        axis.set(title=title, xlim=(0, 1), ylim=(0, 1.02), xlabel='recall', ylabel='precision')
        axis.title.set_size(9)
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize=6, title='AP', title_fontsize=6)
        else:
            axis.text(0.5, 0.5, 'no objects', ha='center')
    names_of_colours = [Line2D([], [], color=f'C{i}', label=name) for i, name in enumerate(evaluations)]
    figure.legend(handles=names_of_colours, loc='outside upper center', ncols=2, frameon=False)
    return figure
