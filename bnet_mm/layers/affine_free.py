"""Normalising without an affine of one's own: what the layers share, and torch's norms that only normalise."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bnet_mm.ops import select_backend
from bnet_mm.ops.bnet import Map, fused_bnet
from bnet_mm.ops.schemas import wide_dtype


def normalise(
    x: Tensor | Map, mean: Tensor, var: Tensor, eps: float, weight: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """``(x - mean) / sqrt(var + eps) * weight + bias``, in one pass where kernels are: theirs, with one tap.

    Args:
        x: (N, C, ...), or what :func:`bnet_mm.ops.bnet.moments` has returned for it.
        mean, var: (C,) or (N, C).
        eps: Added to the variance.
        weight, bias: (C,); None for 1 and 0.
    """
    whole, carrier = x if isinstance(x, Map) else (x, None)
    channels, dtype = whole.shape[1], wide_dtype(whole.dtype)
    mean, rstd = mean.to(dtype), (var.to(dtype) + eps).rsqrt()
    weight = rstd.new_ones(channels) if weight is None else weight
    bias = rstd.new_zeros(channels) if bias is None else bias
    if select_backend(whole, 1) != 'reference':
        maps = x if whole.dim() == 4 else whole.reshape(whole.shape[0], channels, -1, 1)
        return fused_bnet(maps, mean, rstd, weight.view(-1, 1, 1, 1), bias).view_as(whole)
    places = [1] * (whole.dim() - 2)
    wide = whole.to(dtype) if carrier is None else whole.detach() + carrier
    scale = (rstd * weight).view(-1, channels, *places)
    # Not x * scale + shift, which would cancel where the mean is large.
    return torch.addcmul(bias.view(-1, *places), wide - mean.view(-1, channels, *places), scale).to(whole.dtype)


def add_stand_ins(norm: nn.Module, num_features: int) -> None:
    """Give a norm without affine a ``weight`` of ones and a ``bias`` of zeros that its forward never reads.

    Hosts fill, zero or freeze the weight of every norm of a class, where the None of ``affine=False`` would stop them
    (PIDNet, CenterNet, Conformer, ``partial_bn``). Buffers, but not in the state dict.
    """
    like = next((value for value in norm.buffers() if value.is_floating_point()), torch.empty(0))
    for name, value in (('weight', 1.0), ('bias', 0.0)):
        norm._parameters.pop(name, None)
        norm.register_buffer(name, like.new_full((num_features,), value), persistent=False)
    # As torch's own: torch.fx would trace into others, and fix their training flag.
    norm.__module__ = nn.BatchNorm2d.__module__


class AffineFreeGroupNorm(nn.GroupNorm):
    """GroupNorm that only normalises; ``weight`` and ``bias`` are stand-ins."""

    def __init__(self, num_groups: int, num_channels: int, eps: float = 1e-5) -> None:
        super().__init__(num_groups, num_channels, eps, affine=False)
        add_stand_ins(self, num_channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.group_norm(x, self.num_groups, None, None, self.eps)


class AffineFreeInstanceNorm2d(nn.InstanceNorm2d):
    """InstanceNorm2d that only normalises; ``weight`` and ``bias`` are stand-ins."""

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float = 0.1, **options: Any) -> None:
        super().__init__(num_features, eps, momentum, affine=False, **options)
        add_stand_ins(self, num_features)

    def _apply_instance_norm(self, x: Tensor) -> Tensor:
        uses_input = self.training or not self.track_running_stats
        statistics = (self.running_mean, self.running_var)
        return F.instance_norm(x, *statistics, None, None, uses_input, self.momentum or 0.0, self.eps)
