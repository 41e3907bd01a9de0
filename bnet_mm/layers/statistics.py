"""Running statistics as torch's batch norm keeps them, for every layer that keeps some."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bnet_mm.ops.dispatch import is_exporting
from bnet_mm.ops.schemas import wide_dtype


def uses_batch_statistics(norm: nn.modules.batchnorm._BatchNorm) -> bool:
    """Whether the next call of a batch norm takes the statistics of its input: in training, or where none were kept."""
    return norm.training or (norm.running_mean is None and norm.running_var is None)


def take_statistics(norm: nn.Module, other: nn.Module) -> nn.Module:
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
    running = norm.running_mean, norm.running_var
    tracks, batch_statistics = norm.training and norm.track_running_stats, uses_batch_statistics(norm)
    if tracks and norm.momentum is None and None not in running:
        mean, var = map(torch.zeros_like, running)
        y = F.batch_norm(x, mean, var, weight, bias, True, 1.0, norm.eps)  # momentum 1: writes the batch's statistics
        update_running_statistics(norm, mean, var)
        return y
    if tracks and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
    if batch_statistics and not tracks:
        running = None, None
    elif not batch_statistics and x.requires_grad and not (torch.jit.is_tracing() or is_exporting()):
        running = tuple(buffer.clone() for buffer in running)
    return F.batch_norm(x, *running, weight, bias, batch_statistics, norm.momentum or 0.0, norm.eps)


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
        share = norm.momentum
        if share is None:
            share = 0 if counter is None else 1 / counter.to(wide_dtype(running.dtype))
        running.mul_(1 - share).add_((new * share).to(running.dtype))
