"""The operations of bnet.py in plain torch: any device, any floating dtype, any odd k, any dilation."""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from bnet_mm.ops.schemas import wide_dtype


def bnet_reference(
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None = None,
    relu: bool = False,
    dilation: int = 1,
) -> Tensor:
    """As :func:`bnet_mm.ops.bnet`."""
    per_map = (-1, x.shape[1], 1, 1)
    dtype = wide_dtype(x.dtype)
    x_hat = (x.to(dtype) - mean.to(dtype).view(per_map)) * rstd.to(dtype).view(per_map)
    padding = dilation * (weight.shape[-1] // 2)
    # Autocast would round what goes into a convolution.
    with nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False):
        y = F.conv2d(x_hat, weight.to(dtype), bias.to(dtype), padding=padding, dilation=dilation, groups=x.shape[1])
    if residual is not None:
        y = y + residual
    return (y.relu() if relu else y).to(x.dtype)


def moments_reference(x: Tensor, over_batch: bool) -> tuple[Tensor, Tensor]:
    """As :func:`bnet_mm.ops.moments`, without the first return value."""
    x, dims = x.to(wide_dtype(x.dtype)), (0, 2, 3) if over_batch else (2, 3)
    var, mean = torch.var_mean(x, dims, correction=0)  # the mean of a constant is that constant, where mean() rounds
    return torch.where(mean.isfinite(), mean, x.mean(dims)), var  # that of an infinite map would be NaN
