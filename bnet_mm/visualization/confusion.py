"""Confusion matrices of classifiers and segmentors, from the predictions of tools/test.py --out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_WITH_NUMBERS = 20  # classes of a matrix that shows its numbers


def confusion_matrix(samples: Sequence[Mapping[str, Any]]) -> Tensor:
    """(classes, classes) counts of images, or of pixels: true classes in rows, predicted ones in columns.

    Args:
        samples: mmpretrain's (``gt_label``, ``pred_score``) or mmseg's (``gt_sem_seg``, ``pred_sem_seg``,
            ``seg_logits``) data samples as dicts; labels beyond the classes, such as 255, are not counted.

    Raises:
        KeyError: If they are neither.
    """
    scores = samples[0]['seg_logits']['data'] if 'seg_logits' in samples[0] else samples[0]['pred_score']
    classes = max(2, len(scores))  # one channel is a sigmoid's
    total = torch.zeros(classes * classes, dtype=torch.long)
    for sample in samples:
        if 'seg_logits' in sample:
            true, guess = (sample[key]['data'].flatten().long() for key in ('gt_sem_seg', 'pred_sem_seg'))
        else:
            true, guess = sample['gt_label'], sample['pred_score'].argmax().view(1)
        there = true < classes
        total += torch.bincount(true[there] * classes + guess[there], minlength=classes * classes)
    return total.view(classes, classes)


def draw_confusion(matrix: Tensor, classes: Sequence[str]) -> Figure:
    """The matrix with each row as shares of its true class, in percent where there is room for numbers."""
    from matplotlib.figure import Figure

    shares = 100 * matrix.double() / matrix.sum(1, keepdim=True).clamp_min(1)
    size = max(4, min(12, 0.5 * len(matrix) + 1.5))
    figure = Figure(figsize=(size + 1, size), layout='constrained')
    axis = figure.subplots()
    drawn = axis.imshow(shares, vmin=0, vmax=100, cmap='viridis')
    figure.colorbar(drawn, label='% of the true class')
    names = list(classes) if len(classes) == len(matrix) else [str(i) for i in range(len(matrix))]
    axis.set_xticks(range(len(names)), names, rotation=90)
    axis.set_yticks(range(len(names)), names)
    axis.set(xlabel='predicted', ylabel='true')
    if len(matrix) <= MOST_WITH_NUMBERS:
        for i, row in enumerate(shares.tolist()):
            for j, share in enumerate(row):
                axis.text(j, i, f'{share:.0f}', ha='center', va='center', fontsize=7, color='w' if share < 50 else 'k')
    return figure
