"""Which positions BNET enhances (paper, section 4.6 and Figure 4)."""

from __future__ import annotations

import torch
from torch import Tensor

from bnet_mm.layers import BNET


def enhancement_map(layer: BNET, x_hat: Tensor, y: Tensor) -> Tensor:
    """Count, at each position, the channels whose output lies above the channel's regression line.

    The line is the least-squares one through the pairs of the transform's input and output at all positions of all
    given maps; the paper does not say whether it is fitted to one image, give one image for that. In BN all pairs lie
    on a line, so that what lies above is rounding: an output counts from 4 units of its dtype's precision, relative to
    the largest output and bias of the channel, above the line. BN then gives exactly 0.

    Args:
        layer: The BNET whose transform this was.
        x_hat: (N, C, H, W), its normalised input: what ``layer.norm`` gave.
        y: (N, C, H, W), its output: what ``layer.bnconv`` gave.

    Returns:
        (N, H, W), integers from 0 to C.
    """
    over = (0, 2, 3)
    x, bias = x_hat.double(), layer.bnconv.bias.detach().double()
    x = x - x.mean(over, keepdim=True)
    residual = y.double() - y.double().mean(over, keepdim=True)
    variation = x.square().sum(over, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)  # a constant channel has none
    residual = residual - (x * residual).sum(over, keepdim=True) / variation * x
    scale = y.abs().amax(over, keepdim=True).double() + bias.abs()[:, None, None]
    return (residual > 4 * torch.finfo(y.dtype).eps * scale).sum(1)
