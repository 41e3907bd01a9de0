"""Ground truth and the detections of several models beside each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from pycocotools.cocoeval import COCOeval

from bnet_mm.visualization.detections import Matches

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SCORE = 0.3
COLOURS = dict(matched='lime', false='red', missed='orange')


def by_difference(found: Mapping[str, Mapping[int, Matches]]) -> list[tuple[int, int]]:
    """Images and how much the models differ there, those where they differ most first.

    Args:
        found: The matches of each model, by image id.

    Returns:
        (image id, difference): the number of objects that some model finds and some other does not, and the largest
        difference in the number of false detections.
    """

    def difference(image: int) -> int:
        here = [model[image] for model in found.values()]
        somewhere = set().union(*(one.found for one in here))
        everywhere = [annotation for annotation in somewhere if all(annotation in one.found for one in here)]
        false = [len(one.false) for one in here]
        return len(somewhere) - len(everywhere) + max(false) - min(false)

    images = next(iter(found.values()))
    return sorted(((image, difference(image)) for image in images), key=lambda pair: (-pair[1], pair[0]))


def draw_side_by_side(
    evaluations: Mapping[str, COCOeval], found: Mapping[str, Mapping[int, Matches]], image: int, picture: np.ndarray
) -> Figure:
    """The objects of an image, and what each model made of them.

    Args:
        evaluations, found: Of each model; the matches are those of detections with at least ``SCORE``.
        image: Its id.
        picture: (H, W, 3), RGB.
    """
    from matplotlib.figure import Figure

    truth = next(iter(evaluations.values())).cocoGt
    high, wide = picture.shape[:2]
    panels = 1 + len(evaluations)
    figure = Figure(figsize=(3.4 * panels, 3.4 * high / wide + 0.7), layout='constrained')
    axes = figure.subplots(1, panels)
    for axis in axes:
        axis.imshow(picture)
        axis.set_axis_off()
    objects = [truth.anns[one] for one in truth.getAnnIds(imgIds=[image])]
    axes[0].set_title(f'ground truth, {len(objects)} objects', fontsize=8)
    for one in objects:
        _box(axes[0], one['bbox'], 'deepskyblue', truth.cats[one['category_id']]['name'])
    for axis, (name, evaluation) in zip(axes[1:], evaluations.items()):
        here = found[name][image]
        for kind, ids, anns in (
            ('missed', here.missed, truth.anns),
            ('false', here.false, evaluation.cocoDt.anns),
            ('matched', here.right, evaluation.cocoDt.anns),
        ):
            for one in (anns[index] for index in ids):
                label = truth.cats[one['category_id']]['name']
                label += f' {one["score"]:.2f}' if 'score' in one else ''
                _box(axis, one['bbox'], COLOURS[kind], label, dashed=kind == 'missed')
        counts = f'{len(here.right)} matched, {len(here.false)} false, {len(here.missed)} missed'
        axis.set_title(f'{name}\n{counts}', fontsize=8)
    legend = 'green: matched, red: false, orange and dashed: missed'
    figure.supxlabel(f'detections with a score of at least {SCORE} at IoU 0.5; {legend}', fontsize=7)
    return figure


def _box(axis: Any, box: Any, colour: str, label: str, dashed: bool = False) -> None:
    from matplotlib.patches import Rectangle

    line = '--' if dashed else '-'
    axis.add_patch(Rectangle(box[:2], *box[2:], edgecolor=colour, linewidth=1.3, linestyle=line, fill=False))
    axis.text(box[0], box[1], label, fontsize=5, color='black', va='bottom', bbox=dict(facecolor=colour, pad=0.6, lw=0))
