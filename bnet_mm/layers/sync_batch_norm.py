"""Batch norm whose statistics are those of the joined batch of all processes, on any device.

torch's SyncBatchNorm does the same for accelerators only. This class is not a subclass of it: DistributedDataParallel
refuses models that hold one on a CPU. In a single process it is plain batch norm, so there is nothing to revert.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from bnet_mm.layers.affine_free import add_stand_ins, normalise
from bnet_mm.layers.arguments import Duck
from bnet_mm.layers.statistics import (
    batch_norm,
    running_statistics,
    take_statistics,
    update_running_statistics,
    uses_batch_statistics,
)
from bnet_mm.ops.bnet import Map, fused_moments, moments
from bnet_mm.ops.schemas import wide_dtype

if TYPE_CHECKING:
    from typing_extensions import Self


def world_size(group: dist.ProcessGroup | None) -> int:
    """Number of processes that share statistics; 1 where nothing is distributed."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


class SumOverProcesses(torch.autograd.Function):
    """The sum of a tensor over all processes; its gradient is the sum of theirs, since each of them used it."""

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        total = x.contiguous().clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        total = gradient.contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


class _JoinStatistics(torch.autograd.Function):
    """Mean (C,), biased variance (C,) and count () of the joined batch from those of each process; one collective
    each way."""

    @staticmethod
    def forward(ctx, mean: Tensor, var: Tensor, count: int, group: dist.ProcessGroup | None):
        local = torch.cat([mean, var, mean.new_full((1,), count)])
        gathered = local.new_empty(world_size(group), local.numel())
        dist.all_gather(list(gathered), local, group=group)
        means, variances, counts = gathered.split([len(mean), len(mean), 1], dim=1)
        total = counts.sum()
        share = counts / total
        joint_mean = (share * means).sum(0)
        # Deviations of the processes' means, not a difference of squares, which would cancel.
        joint_var = (share * (variances + (means - joint_mean).square())).sum(0)
        ctx.group, ctx.share = group, count / total
        ctx.save_for_backward(mean - joint_mean)
        ctx.mark_non_differentiable(total)
        return joint_mean, joint_var, total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_mean: Tensor, grad_var: Tensor, _) -> tuple[Tensor, Tensor, None, None]:
        (deviation,) = ctx.saved_tensors
        total = torch.cat([grad_mean, grad_var])
        dist.all_reduce(total, group=ctx.group)
        grad_mean, grad_var = total.view(2, -1)
        return ctx.share * (grad_mean + 2 * grad_var * deviation), ctx.share * grad_var, None, None


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm without affine over the joined batch of all processes of ``process_group``, of any sizes.

    Args:
        num_features, eps, momentum, track_running_stats: As in ``torch.nn.BatchNorm2d``.
        process_group: Processes that share statistics; None for all.

    Shapes:
        input and output: (N, C, ...).

    Raises:
        ValueError: In training mode, if all processes together have one value per channel.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        track_running_stats: bool = True,
        process_group: dist.ProcessGroup | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        options: dict[str, Any] = dict(device=device, dtype=dtype)
        super().__init__(num_features, eps, momentum, False, track_running_stats, **options)
        add_stand_ins(self, num_features)
        self.process_group = process_group

    @classmethod
    def from_host(cls, norm: Duck) -> Self:
        """Take over the statistics and settings of torch's or mmcv's SyncBatchNorm; its affine is left out."""
        group = getattr(norm, 'process_group', getattr(norm, 'group', None))
        layer = cls(norm.num_features, norm.eps, norm.momentum, norm.track_running_stats, group)
        return take_statistics(layer, norm)

    def _check_input_dim(self, x: Tensor) -> None:
        if x.dim() < 2:
            raise ValueError(f'SyncBatchNorm: input must be (N, C, ...), got shape {tuple(x.shape)}')

    def is_local(self, x: Tensor) -> bool:
        """Whether x (N, C, ...) has all the values whose statistics are taken, and more than one of each channel."""
        if not uses_batch_statistics(self):
            return True
        return x.numel() > x.shape[1] and not (self.training and world_size(self.process_group) > 1)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = (self.weight, self.bias) if self.affine else (None, None)
        if not self.training or world_size(self.process_group) == 1:
            return batch_norm(self, x, weight, bias)
        self._check_input_dim(x)
        maps: Tensor | Map
        maps = x if x.dim() == 4 else x.reshape(*x.shape[:2], math.prod(x.shape[2:]), 1)
        maps, mean, var = self.statistics(maps, moments)
        return normalise(maps, mean, var, self.eps, weight, bias).view_as(x)

    def statistics(self, x: Tensor, moments: Callable = fused_moments) -> tuple[Tensor | Map, Tensor, Tensor]:
        """As :func:`bnet_mm.layers.normalisers.statistics`: of the joined batch in training mode."""
        if not uses_batch_statistics(self):
            return x, *running_statistics(self)
        count = x.numel() // x.shape[1]
        if count:
            x, mean, var = moments(x, over_batch=True)
        else:  # an empty batch takes part in the collectives and adds nothing
            mean = var = x.to(wide_dtype(x.dtype)).sum((0, 2, 3))
        total = count
        if self.training and world_size(self.process_group) > 1:
            mean, var, total = _JoinStatistics.apply(mean, var, count, self.process_group)
        # Only a process with one value or none can be part of such a batch; the others need not wait for the count.
        if count <= 1 and total <= 1:
            raise ValueError(
                f'SyncBatchNorm: input must have more than one value per channel over all processes in training mode, '
                f'got {int(total)}'
            )
        if self.training and self.track_running_stats:
            update_running_statistics(self, mean, var * (total / (total - 1)))
        return x, mean, var


class AffineSyncBatchNorm(SyncBatchNorm):
    """Stands for torch's or mmcv's SyncBatchNorm on a CPU, with its parameters and the keys of its state dict."""

    @classmethod
    def from_host(cls, norm: Duck) -> Self:
        layer = super().from_host(norm)
        layer.affine, layer.weight, layer.bias = norm.affine, norm.weight, norm.bias
        return layer
