"""Normalising without an affine of one's own: what the layers share, and torch's norms that only normalise."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bnet_mm.ops import select_backend
from bnet_mm.ops.bnet import fused_bnet


def normalise(
    x: Tensor, mean: Tensor, var: Tensor, eps: float, weight: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """``(x - mean) / sqrt(var + eps) * weight + bias``, in one pass where kernels are: theirs, with one tap.

    Args:
        x: (N, C, ...).
        mean, var: (C,) or (N, C).
        eps: Added to the variance.
        weight, bias: (C,); None for 1 and 0.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    mean, rstd = mean.to(dtype), (var.to(dtype) + eps).rsqrt()
    weight = rstd.new_ones(x.shape[1]) if weight is None else weight
    bias = rstd.new_zeros(x.shape[1]) if bias is None else bias
    if select_backend(x, 1) != 'reference':
        maps = x if x.dim() == 4 else x.reshape(x.shape[0], x.shape[1], -1, 1)
        return fused_bnet(maps, mean, rstd, weight.view(-1, 1, 1, 1), bias).view_as(x)
    places = [1] * (x.dim() - 2)
    deviation = x.to(dtype) - mean.view(-1, x.shape[1], *places)
    # Not x * scale + shift, which would cancel where the mean is large.
    return torch.addcmul(bias.view(-1, *places), deviation, (rstd * weight).view(-1, x.shape[1], *places)).to(x.dtype)


def batch_norm(norm: nn.modules.batchnorm._BatchNorm, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """What torch's batch norm computes in ``norm.forward(x)``, running statistics too, but with this affine."""
    norm._check_input_dim(x)
    tracks = norm.training and norm.track_running_stats
    counts = tracks and norm.num_batches_tracked is not None
    if counts:
        norm.num_batches_tracked.add_(1)
    momentum = norm.momentum
    if momentum is None:
        momentum = 1 / float(norm.num_batches_tracked) if counts else 0.0
    running = (norm.running_mean, norm.running_var) if tracks or not norm.training else (None, None)
    return F.batch_norm(x, *running, weight, bias, uses_batch_statistics(norm), momentum, norm.eps)


def uses_batch_statistics(norm: nn.modules.batchnorm._BatchNorm) -> bool:
    """Whether the next call of a batch norm takes the statistics of its input: in training, or where none were kept."""
    return norm.training or (norm.running_mean is None and norm.running_var is None)


def take_statistics(norm: nn.Module, other: nn.Module) -> nn.Module:
    """Give ``norm`` copies of the running statistics of ``other``, on their device, None for None; and its mode."""
    for name in ('running_mean', 'running_var', 'num_batches_tracked'):
        value = getattr(other, name, None)
        setattr(norm, name, None if value is None else value.clone())
    return norm.train(other.training)


def add_stand_ins(norm: nn.Module, num_features: int) -> None:
    """Give a norm without affine a ``weight`` of ones and a ``bias`` of zeros that its forward never reads.

    Hosts fill, zero or freeze the weight of every norm of a class, where the None of ``affine=False`` would stop them
    (PIDNet, CenterNet, Conformer, ``partial_bn``). Buffers, but not in the state dict.
    """
    like = next((value for value in norm.buffers() if value.is_floating_point()), torch.empty(0))
    for name, value in (('weight', 1.0), ('bias', 0.0)):
        norm._parameters.pop(name, None)
        norm.register_buffer(name, like.new_full((num_features,), value), persistent=False)


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
