"""Running statistics as torch's batch norm keeps them, for every layer that keeps some."""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bnet_mm.layers.arguments import Duck
from bnet_mm.ops.dispatch import is_exporting
from bnet_mm.ops.schemas import wide_dtype

Norm = TypeVar('Norm', bound=nn.Module)


def uses_batch_statistics(norm: nn.modules.batchnorm._BatchNorm) -> bool:
    """Whether the next call of a batch norm takes the statistics of its input: in training, or where none were kept."""
    buffers = norm._buffers  # attributes take a microsecond each
    return norm.training or (buffers.get('running_mean') is None and buffers.get('running_var') is None)


def running_statistics(norm: Duck) -> tuple[Tensor, Tensor]:
    """Running mean and variance of a norm that does not use its input's: then both are there."""
    return norm.running_mean, norm.running_var


def take_statistics(norm: Norm, other: nn.Module) -> Norm:
    """Give ``norm`` copies of the running statistics of ``other``, on their device, None for None; and its mode."""
    for name in ('running_mean', 'running_var', 'num_batches_tracked'):
        value = getattr(other, name, None)
        setattr(norm, name, None if value is None else value.clone())
    return norm.train(other.training)


def batch_norm(norm: nn.modules.batchnorm._BatchNorm, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """What torch's batch norm computes in ``norm.forward(x)``, running statistics too, but with this affine.

    Except that nothing waits for a device, and that what is kept for the backward pass are not the running buffers,
    which a later pass changes.
    """
    norm._check_input_dim(x)
    running_mean, running_var = norm.running_mean, norm.running_var
    tracks, batch_statistics = norm.training and norm.track_running_stats, uses_batch_statistics(norm)
    if tracks and norm.momentum is None and running_mean is not None and running_var is not None:
        mean, var = torch.zeros_like(running_mean), torch.zeros_like(running_var)
        y = F.batch_norm(x, mean, var, weight, bias, True, 1.0, norm.eps)  # momentum 1: writes the batch's statistics
        update_running_statistics(norm, mean, var)
        return y
    if tracks and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
    if batch_statistics and not tracks:
        running_mean = running_var = None
    elif not batch_statistics and x.requires_grad and not (torch.jit.is_tracing() or is_exporting()):
        running_mean = None if running_mean is None else running_mean.clone()
        running_var = None if running_var is None else running_var.clone()
    return F.batch_norm(x, running_mean, running_var, weight, bias, batch_statistics, norm.momentum or 0.0, norm.eps)


def whole_norm(
    norm: nn.modules.batchnorm._BatchNorm, dtype: torch.dtype, *parameters: Tensor
) -> tuple[Tensor | None, Tensor | None, bool, float, float] | None:
    """The statistics that :func:`bnet_mm.ops.norm.fused_norm` needs for a forward pass of ``norm``, which it counts.

    Args:
        dtype: That of the map.
        parameters: What follows ``norm``, which has no affine.

    Returns:
        running_mean, running_var, batch_statistics, momentum, eps; None for what the operation does not take: other
        dtypes than float32 (float64 for float64), half of the running statistics, and their plain average.
    """
    buffers = norm._buffers
    running = running_mean, running_var = buffers.get('running_mean'), buffers.get('running_var')
    tracks = norm.training and norm.track_running_stats
    batch_statistics = uses_batch_statistics(norm)
    if batch_statistics and not tracks:
        running = None, None
    wide = wide_dtype(dtype)
    for tensor in (*parameters, *running):
        if tensor is not None and tensor.dtype != wide:
            return None
    if (running_mean is None) != (running_var is None) or (tracks and norm.momentum is None):
        return None
    counter = buffers.get('num_batches_tracked')
    if tracks and counter is not None:
        counter.add_(1)
    return *running, batch_statistics, norm.momentum or 0.0, norm.eps


@torch.no_grad()
def update_running_statistics(norm: nn.modules.batchnorm._BatchNorm, mean: Tensor, var: Tensor) -> None:
    """BatchNorm's rule: ``running = (1 - momentum) * running + momentum * new``; momentum None is the plain average.

    The counter stays where it is: nobody waits for a GPU. Statistics or a counter that were removed are left out.
    """
    counter = norm.num_batches_tracked
    if counter is not None:
        counter.add_(1)
    for running, new in ((norm.running_mean, mean), (norm.running_var, var)):
        if running is None:
            continue
        share: float | Tensor | None = norm.momentum
        if share is None:
            share = 0 if counter is None else 1 / counter.to(wide_dtype(running.dtype))
        running.mul_(1 - share).add_((new * share).to(running.dtype))
