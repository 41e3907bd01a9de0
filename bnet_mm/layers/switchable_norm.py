"""Switchable norm (Luo et al., "Differentiable Learning-to-Normalize via Switchable Normalization", arXiv 1806.10779).

Mean and variance are mixtures of those of instance, layer and batch norm, each with its own softmax weights.

Differences from the official code: ``momentum`` is the weight of the new batch, as everywhere in torch (the official
0.9 is our 0.1); ``using_moving_average=False`` keeps the average over the batches, ready for use, where the official
code keeps a sum that somebody must divide; the running variance starts at 1; maps of one pixel have instance variance 0
instead of NaN; and the gradients of SyncSN are right.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bnet_mm.checkpoint.layouts import STATISTICS, move_key
from bnet_mm.layers.affine_free import add_stand_ins, normalise
from bnet_mm.layers.arguments import check_positive_int, is_real
from bnet_mm.layers.scripting import refuse_scripting
from bnet_mm.layers.statistics import running_statistics, update_running_statistics, uses_batch_statistics
from bnet_mm.layers.sync_batch_norm import SumOverProcesses, world_size
from bnet_mm.ops.bnet import Map, fused_moments, moments


def exact(x: Tensor) -> Tensor:
    """In double precision, where the device has it."""
    return x if x.device.type == 'mps' else x.double()


class RunningStatistics(nn.modules.batchnorm._BatchNorm):
    """The running statistics of a switchable norm, held as a batch norm holds them, so that whatever freezes, resets or
    recomputes those of batch norms (``norm_eval``, ``update_bn``, PreciseBN) does so here. Never called itself.
    """

    def __init__(self, num_features: int, eps: float, momentum: float, device=None, dtype=None) -> None:
        super().__init__(num_features, eps, momentum, affine=False, device=device, dtype=dtype)
        add_stand_ins(self, num_features)


class _SwitchableNorm(nn.Module):
    """What all dimensions share; ``input_dim`` is the number of dimensions of the input.

    Batch statistics are those of the batch where ``self.bn`` is in training mode, and running ones where it is not.
    ``convert_sync_batchnorm`` leaves them as they are; :class:`SyncSN` is the synchronised form.

    Args:
        num_features: Number of channels C.
        eps: Added to the variance.
        momentum: Weight of the new batch in the running statistics, in (0, 1]; only for the moving average.
        using_moving_average: Running statistics are moving averages; False for the average of all batches so far.
        using_bn: Mix batch statistics in. Without them (one image per GPU) there is nothing to track.
        last_gamma: Start with weight 0, for the last norm of a residual block.
        affine: Have weight and bias.

    Raises:
        ValueError: For an argument outside these; in forward for an input of another shape.

    State dict: ``weight``, ``bias``, ``bn.running_mean``, ``bn.running_var`` (C,), ``mean_weight`` and ``var_weight``
    (3,), or (2,) without batch statistics. The official names (without ``bn.``) and shapes, (1, C, 1, 1) and (1, C, 1),
    load too.
    """

    _abbr_ = 'sn'
    __prepare_scriptable__ = refuse_scripting
    input_dim: int

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        using_moving_average: bool = True,
        using_bn: bool = True,
        last_gamma: bool = False,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        check_positive_int(name, 'num_features', num_features)
        if not is_real(momentum) or not 0 < momentum <= 1:
            raise ValueError(
                f'{name}: momentum must be the weight of the new batch, in (0, 1], got {momentum!r}; for the plain '
                'average of all batches use using_moving_average=False'
            )
        if momentum >= 0.9:
            warnings.warn(
                f'{name}: momentum={momentum} is the weight of the new batch; the official code states the '
                'share that is kept: its 0.9 is 0.1 here',
                stacklevel=2,
            )
        self.num_features, self.eps, self.affine = num_features, eps, affine
        self.using_moving_average, self.using_bn, self.last_gamma = using_moving_average, using_bn, last_gamma
        options: dict[str, Any] = dict(device=device, dtype=dtype)
        self.bn = RunningStatistics(num_features, eps, momentum, **options) if using_bn else None
        self.mean_weight = nn.Parameter(torch.empty(len(self.kinds), **options))
        self.var_weight = nn.Parameter(torch.empty(len(self.kinds), **options))
        if affine:
            self.weight = nn.Parameter(torch.empty(num_features, **options))
            self.bias = nn.Parameter(torch.empty(num_features, **options))
        else:
            add_stand_ins(self, num_features)
        self.reset_parameters()

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """Conversions of torch and mmengine put their SyncBatchNorm here."""
        super().add_module(name, self.bn if name == 'bn' and hasattr(self, 'bn') else module)

    @property
    def kinds(self) -> list[str]:
        """The norms that are mixed, in the order of ``mean_weight`` and ``var_weight``."""
        return ['IN', 'LN', 'BN'] if self.using_bn else ['IN', 'LN']

    def reset_running_stats(self) -> None:
        """Running mean 0, variance 1, no batches counted, as BatchNorm."""
        if self.bn is not None:
            self.bn.reset_running_stats()

    def reset_parameters(self) -> None:
        """Equal mixture; weight 1, or 0 with ``last_gamma``; bias 0; running statistics as new."""
        self.reset_running_stats()
        nn.init.ones_(self.mean_weight)
        nn.init.ones_(self.var_weight)
        if self.affine:
            nn.init.constant_(self.weight, 0 if self.last_gamma else 1)
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        self._check_input(x)
        maps, mean, var = self._measure(x)
        return normalise(maps, mean, var, self.eps, *((self.weight, self.bias) if self.affine else ())).to(x.dtype)

    def _measure(self, x: Tensor) -> tuple[Tensor | Map, Tensor, Tensor]:
        """x in float32 at least, for :func:`normalise`, and the mixed mean and variance (N, C)."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return wide, *self._mix(*self._statistics(wide))

    def _check_input(self, x: Tensor) -> None:
        if x.dim() != self.input_dim or x.shape[1] != self.num_features:
            raise ValueError(
                f'{type(self).__name__}: input must be {self.input_dim}-D with num_features={self.num_features} '
                f'channels, got shape {tuple(x.shape)}'
            )

    def _mix(self, means: list[Tensor], variances: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Their mixtures, (N, C)."""
        mixed = []
        for weight, values in ((self.mean_weight, means), (self.var_weight, variances)):
            share = weight.to(values[0].dtype).softmax(0)
            value: Any = sum(share[i] * each for i, each in enumerate(values))
            mixed.append(value.expand(-1, self.num_features))  # LN alone has one for all channels
        return mixed[0], mixed[1]

    def _statistics(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Means and variances of each kind, of shapes that broadcast to (N, C)."""
        var_in, mean_in = torch.var_mean(x.flatten(2), 2, correction=0)
        return self._statistics_from(mean_in, var_in, math.prod(x.shape[2:]))

    def _statistics_from(self, mean_in: Tensor, var_in: Tensor, pixels: int) -> tuple[list[Tensor], list[Tensor]]:
        """The same from mean and biased variance (N, C) of the instances."""
        # In double precision: means of equal means must be equal to these, or a constant map would not become 0.
        mean_in, var_in = exact(mean_in), exact(var_in) * (pixels / max(1, pixels - 1))
        # Variances within instances plus the variance of their means, not a difference of squares, which would cancel.
        mean_ln = mean_in.mean(1, keepdim=True)
        var_ln = (var_in + (mean_in - mean_ln).square()).mean(1, keepdim=True)
        if self.bn is None:
            return [mean_in, mean_ln], [var_in, var_ln]
        if not uses_batch_statistics(self.bn):
            mean_bn, var_bn = self._running()
            return [mean_in, mean_ln, mean_bn], [var_in, var_ln, var_bn]
        mean_bn = self._batch_mean(mean_in)
        var_bn = self._batch_mean(var_in + (mean_in - mean_bn).square())
        if self.bn.training and not self._is_empty(mean_in):
            self._track(self.bn, mean_bn.detach()[0], var_bn.detach()[0])
        return [mean_in, mean_ln, mean_bn], [var_in, var_ln, var_bn]

    def _running(self) -> tuple[Tensor, Tensor]:
        """Running mean and variance, (1, C); copies, for the backward pass may come after a training pass."""
        mean, var = running_statistics(self.bn)
        return mean.clone()[None], var.clone()[None]

    def _is_empty(self, x: Tensor) -> bool:
        """Whether the batch of x (N, C) has nothing to track."""
        return x.shape[0] == 0

    def _batch_mean(self, x: Tensor) -> Tensor:
        """The mean (1, C) of x (N, C) over whatever shares batch statistics with this process."""
        return x.mean(0, keepdim=True)

    @torch.no_grad()
    def _track(self, bn: RunningStatistics, mean: Tensor, var: Tensor) -> None:
        running_mean, running_var, counter = bn.running_mean, bn.running_var, bn.num_batches_tracked
        if self.using_moving_average or bn.momentum is None:
            update_running_statistics(bn, mean, var)
        elif running_mean is not None and running_var is not None and counter is not None:
            counter.add_(1)
            share = 1 / counter.to(mean.dtype)
            square = running_var + running_mean.square()
            square = square + (var + mean.square() - square) * share
            running_mean.copy_(running_mean + (mean - running_mean) * share)
            running_var.copy_(square - running_mean.square())

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        own = self.state_dict()
        for name in ('weight', 'bias', *STATISTICS):
            value = state_dict.get(prefix + name)
            if not isinstance(value, Tensor):
                continue  # torch says so
            if value.dim() > 1 and value.numel() == self.num_features:
                state_dict[prefix + name] = value.flatten()
            if name in STATISTICS:
                move_key(state_dict, prefix + name, f'{prefix}bn.{name}', own.get(f'bn.{name}'))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        momentum = '' if self.bn is None else f', momentum={self.bn.momentum}'
        text = f'{self.num_features}, eps={self.eps}{momentum}, mixes={"+".join(self.kinds)}'
        options = dict(using_moving_average=False, last_gamma=True)
        text += ''.join(f', {name}={value}' for name, value in options.items() if getattr(self, name) == value)
        return text if self.affine else f'{text}, affine=False'


class SN1d(_SwitchableNorm):
    """Switchable norm of (N, C). One value per instance has no instance statistics: LN and BN are mixed.

    Their variances are unbiased, as in the official code.
    """

    input_dim = 2

    @property
    def kinds(self) -> list[str]:
        return ['LN', 'BN'] if self.using_bn else ['LN']

    def _statistics(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        x = exact(x)
        var_ln, mean_ln = torch.var_mean(x, 1, keepdim=True)
        if self.bn is None:
            return [mean_ln], [var_ln]
        if not uses_batch_statistics(self.bn):
            mean_bn, var_bn = self._running()
            return [mean_ln, mean_bn], [var_ln, var_bn]
        if len(x) == 1:
            raise ValueError(f'SN1d: input must have more than one sample in training mode, got {tuple(x.shape)}')
        var_bn, mean_bn = torch.var_mean(x, 0, keepdim=True)
        if self.bn.training and len(x):
            self._track(self.bn, mean_bn.detach()[0], var_bn.detach()[0])
        return [mean_ln, mean_bn], [var_ln, var_bn]


class SN2d(_SwitchableNorm):
    """Switchable norm of (N, C, H, W): ``norm_cfg=dict(type='SN')``."""

    input_dim = 4

    def statistics(self, x: Tensor, moments: Callable = fused_moments) -> tuple[Map, Tensor, Tensor]:
        """As :func:`bnet_mm.layers.normalisers.statistics`."""
        self._check_input(x)
        pixels = x.shape[2] * x.shape[3]
        maps, mean_in, var_in = moments(x, over_batch=False)
        return maps, *self._mix(*self._statistics_from(mean_in, var_in, pixels))

    def _measure(self, x: Tensor) -> tuple[Map, Tensor, Tensor]:
        return self.statistics(x, moments)


class SN3d(_SwitchableNorm):
    """Switchable norm of (N, C, T, H, W)."""

    input_dim = 5


class SyncSN(SN2d):
    """SN2d whose batch statistics are those of the joined batch of all processes, of any sizes."""

    def _is_empty(self, x: Tensor) -> bool:
        return world_size(None) == 1 and super()._is_empty(x)

    def _batch_mean(self, x: Tensor) -> Tensor:
        if world_size(None) == 1:
            return super()._batch_mean(x)
        total = torch.cat([x.sum(0), x.new_full((1,), len(x))])
        total = SumOverProcesses.apply(total, dist.group.WORLD)
        return (total[:-1] / total[-1])[None]
