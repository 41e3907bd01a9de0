"""Rows of pictures with maps over them, as in the paper's Figures 4 and 5."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch.nn.functional as F
from matplotlib.figure import Figure
from mmengine.visualization import Visualizer
from torch import Tensor


class Row(NamedTuple):
    """A line of a strip: its name, and title and picture (H, W, 3) of each cell."""

    name: str
    cells: list[tuple[str, np.ndarray]]


def heat_picture(values: Tensor, picture: np.ndarray, share: tuple[float, float] = (1.0, 1.0)) -> np.ndarray:
    """The picture (H, W, 3) below a map (h, w) in colours, blue for its least value and red for its largest.

    Args:
        share: Of height and width of the map, what belongs to the picture; the rest is padding and left out.
    """
    high, wide = (max(1, round(size * part)) for size, part in zip(values.shape, share))
    inside = values[None, None, :high, :wide].float()
    scaled = F.interpolate(inside, picture.shape[:2], mode='bilinear', align_corners=False)
    return Visualizer.draw_featmap(scaled[0], picture, channel_reduction='squeeze_mean', alpha=0.5)


def strip(rows: list[Row], caption: str, width: float = 2.4) -> Figure:
    """A figure of the rows below each other, each cell ``width`` inches wide, with the caption below."""
    columns = max(len(row.cells) for row in rows)
    heights = [max(cell.shape[0] / cell.shape[1] for _, cell in row.cells) for row in rows]
    figure = Figure(figsize=(width * columns, width * sum(heights) + 0.35 * len(rows) + 0.5), layout='constrained')
    axes = figure.subplots(len(rows), columns, squeeze=False, height_ratios=heights)
    for row, line in zip(rows, axes):
        for axis in line:
            axis.set_axis_off()
        for axis, (title, picture) in zip(line, row.cells):
            axis.imshow(picture)
            axis.set_title(title, fontsize=7)
        line[0].annotate(
            row.name, (-0.03, 0.5), xycoords='axes fraction', rotation=90, ha='right', va='center', fontsize=7
        )
    figure.supxlabel(caption, fontsize=7, wrap=True)
    return figure
