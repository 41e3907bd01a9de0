"""Maps over pictures: what is padding is left out, what is scaled stays where it was."""

import numpy as np
import torch

from bnet_mm.visualization.strips import Row, heat_picture, strip


def redness(picture):
    return picture[..., 0].astype(int) - picture[..., 2]


def test_padding_is_left_out():
    """Beside a padding of large values, the map of the picture still spans all colours, at its own place."""
    values = torch.full((4, 6), 99.0)
    values[:2, :3] = torch.tensor([[0.0, 0, 1], [0, 0, 1]])
    heat = heat_picture(values, np.full((20, 30, 3), 128, np.uint8), share=(0.5, 0.5))
    assert heat.shape == (20, 30, 3) and heat.dtype == np.uint8
    assert (redness(heat)[:, :10] < -40).all() and (redness(heat)[:, 26:] > 40).all()
    whole = redness(heat_picture(values, np.zeros((20, 30, 3), np.uint8)))
    assert (whole[:7, :12] < -40).all() and (whole[14:] > 40).all()  # with it, the picture's own map has one colour


def test_rows_of_different_lengths():
    picture = np.zeros((10, 20, 3), np.uint8)
    figure = strip([Row('a', [('x', picture)] * 3), Row('b', [('y', picture)])], 'caption')
    assert [len(axis.images) for axis in figure.axes] == [1, 1, 1, 1, 0, 0]
    assert [axis.texts[0].get_text() for axis in (figure.axes[0], figure.axes[3])] == ['a', 'b']
    figure.canvas.draw()
