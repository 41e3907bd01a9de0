"""Batch norm whose statistics are those of the joined batch of all processes, on any device.

torch's SyncBatchNorm does the same for accelerators only. This class is not a subclass of it: DistributedDataParallel
refuses models that hold one on a CPU. In a single process it is plain batch norm, so there is nothing to revert.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


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


class _NormalizeOverProcesses(torch.autograd.Function):
    """``(x - mean) / sqrt(var + eps)`` with the statistics of all processes; one collective each way.

    Returns the normalised x, and the mean (C,), biased variance (C,) and count () of the joined batch.
    """

    @staticmethod
    def forward(ctx, x: Tensor, eps: float, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        dims, shape = [0, *range(2, x.dim())], [1, -1] + [1] * (x.dim() - 2)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        count = x.numel() // x.shape[1]
        if count:
            local_var, local_mean = torch.var_mean(wide, dims, correction=0)
        else:  # an empty batch takes part in the collective and adds nothing
            local_var = local_mean = wide.new_zeros(x.shape[1])
        local = torch.cat([local_mean, local_var, wide.new_tensor([count])])
        gathered = local.new_empty(world_size(group), local.numel())
        dist.all_gather(list(gathered), local, group=group)
        means, variances, counts = gathered.split([x.shape[1], x.shape[1], 1], dim=1)
        total = counts.sum()
        share = counts / total
        mean = (share * means).sum(0)
        # Deviations of the processes' means, not a difference of squares, which would cancel.
        var = (share * (variances + (means - mean).square())).sum(0)
        rstd = (var + eps).rsqrt()
        ctx.group, ctx.dims, ctx.shape = group, dims, shape
        ctx.save_for_backward(x, mean, rstd, total)
        x_hat = ((wide - mean.view(shape)) * rstd.view(shape)).to(x.dtype)
        ctx.mark_non_differentiable(mean, var, total)
        return x_hat, mean, var, total

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor, *_) -> tuple[Tensor, None, None]:
        x, mean, rstd, count = ctx.saved_tensors
        gradient = gradient.to(mean.dtype)
        x_hat = (x.to(mean.dtype) - mean.view(ctx.shape)) * rstd.view(ctx.shape)
        sums = torch.cat([gradient.sum(ctx.dims), (gradient * x_hat).sum(ctx.dims)])
        dist.all_reduce(sums, group=ctx.group)
        mean_gradient, mean_product = (sums / count).view(2, -1)
        gradient = gradient - mean_gradient.view(ctx.shape) - x_hat * mean_product.view(ctx.shape)
        return (gradient * rstd.view(ctx.shape)).to(x.dtype), None, None


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
        options = dict(affine=False, track_running_stats=track_running_stats, device=device, dtype=dtype)
        super().__init__(num_features, eps, momentum, **options)
        self.process_group = process_group

    @classmethod
    def from_host(cls, norm: nn.Module) -> SyncBatchNorm:
        """Take over the statistics and settings of torch's or mmcv's SyncBatchNorm; its affine is left out."""
        group = getattr(norm, 'process_group', getattr(norm, 'group', None))
        layer = cls(norm.num_features, norm.eps, norm.momentum, norm.track_running_stats, group)
        for name in layer._buffers:
            setattr(layer, name, getattr(norm, name))
        return layer.train(norm.training)

    def _check_input_dim(self, x: Tensor) -> None:
        if x.dim() < 2:
            raise ValueError(f'SyncBatchNorm: input must be (N, C, ...), got shape {tuple(x.shape)}')

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or world_size(self.process_group) == 1:
            return super().forward(x)
        self._check_input_dim(x)
        x_hat, mean, var, count = _NormalizeOverProcesses.apply(x, self.eps, self.process_group)
        # Only a process with one value or none can be part of such a batch; the others need not wait for the count.
        if x.numel() <= x.shape[1] and count <= 1:
            raise ValueError(
                f'SyncBatchNorm: input must have more than one value per channel over all processes in training mode, '
                f'got {int(count)}'
            )
        if self.track_running_stats:
            update_running_statistics(self, mean, var * (count / (count - 1)))
        return x_hat


@torch.no_grad()
def update_running_statistics(norm: nn.modules.batchnorm._BatchNorm, mean: Tensor, var: Tensor) -> None:
    """BatchNorm's rule: ``running = (1 - momentum) * running + momentum * new``; momentum None is the plain average."""
    norm.num_batches_tracked.add_(1)
    momentum = 1 / norm.num_batches_tracked.item() if norm.momentum is None else norm.momentum
    norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), momentum)
    norm.running_var.lerp_(var.to(norm.running_var.dtype), momentum)
