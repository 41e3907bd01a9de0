"""Switchable norm (Luo et al., "Differentiable Learning-to-Normalize via Switchable Normalization", arXiv 1806.10779).

Mean and variance are mixtures of those of instance, layer and batch norm, each with its own softmax weights.

Differences from the official code: ``momentum`` is the weight of the new batch, as everywhere in torch (the official
0.9 is our 0.1); ``using_moving_average=False`` keeps the average over the batches, ready for use, where the official
code keeps a sum that somebody must divide; the running variance starts at 1; maps of one pixel have instance variance 0
instead of NaN; and the gradients of SyncSN are right.
"""

from __future__ import annotations

import warnings
from numbers import Real

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bnet_mm.layers.arguments import check_positive_int
from bnet_mm.layers.sync_batch_norm import SumOverProcesses, world_size
from bnet_mm.ops.bnet import Map, fused_moments


class _SwitchableNorm(nn.Module):
    """What all dimensions share; ``input_dim`` is the number of dimensions of the input.

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

    State dict: ``weight``, ``bias``, ``running_mean``, ``running_var`` (C,), ``mean_weight``, ``var_weight`` (3,), or
    (2,) without batch statistics. The official shapes, (1, C, 1, 1) and (1, C, 1), load too.
    """

    _abbr_ = 'sn'
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
        if not isinstance(momentum, Real) or not 0 < momentum <= 1:
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
        self.num_features, self.eps, self.momentum = num_features, eps, momentum
        self.using_moving_average, self.using_bn, self.last_gamma = using_moving_average, using_bn, last_gamma
        options = dict(device=device, dtype=dtype)
        for parameter in ('weight', 'bias'):
            value = nn.Parameter(torch.empty(num_features, **options)) if affine else None
            self.register_parameter(parameter, value)
        self.mean_weight = nn.Parameter(torch.empty(len(self.kinds), **options))
        self.var_weight = nn.Parameter(torch.empty(len(self.kinds), **options))
        if using_bn:
            self.register_buffer('running_mean', torch.zeros(num_features, **options))
            self.register_buffer('running_var', torch.ones(num_features, **options))
            self.register_buffer('num_batches_tracked', torch.tensor(0, device=device))
        self.reset_parameters()

    @property
    def kinds(self) -> list[str]:
        """The norms that are mixed, in the order of ``mean_weight`` and ``var_weight``."""
        return ['IN', 'LN', 'BN'] if self.using_bn else ['IN', 'LN']

    def reset_parameters(self) -> None:
        """Equal mixture; weight 1, or 0 with ``last_gamma``; bias 0."""
        nn.init.ones_(self.mean_weight)
        nn.init.ones_(self.var_weight)
        if self.weight is not None:
            nn.init.constant_(self.weight, 0 if self.last_gamma else 1)
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        self._check_input(x)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        mean, var = self._mix(*self._statistics(wide))
        scale = (var + self.eps).rsqrt()
        shift = -mean * scale
        if self.weight is not None:
            scale, shift = scale * self.weight, shift * self.weight + self.bias
        shape = [*scale.shape] + [1] * (x.dim() - 2)
        return torch.addcmul(shift.view(shape), wide, scale.view(shape)).to(x.dtype)

    def _check_input(self, x: Tensor) -> None:
        if x.dim() != self.input_dim or x.shape[1] != self.num_features:
            raise ValueError(
                f'{type(self).__name__}: input must be {self.input_dim}-D with num_features={self.num_features} '
                f'channels, got shape {tuple(x.shape)}'
            )

    def _mix(self, means: list[Tensor], variances: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Their mixtures, (N, C)."""
        # float32 mixing weights also where the layer itself was cast to half precision
        mean_weight = self.mean_weight.to(means[0].dtype).softmax(0)
        var_weight = self.var_weight.to(means[0].dtype).softmax(0)
        mean = sum(weight * value for weight, value in zip(mean_weight, means))
        return mean, sum(weight * value for weight, value in zip(var_weight, variances))

    def _statistics(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Means and variances of each kind, of shapes that broadcast to (N, C)."""
        var_in, mean_in = torch.var_mean(x.flatten(2), 2, correction=0)
        return self._statistics_from(mean_in, var_in, x[0, 0].numel() if x.numel() else 1)

    def _statistics_from(self, mean_in: Tensor, var_in: Tensor, pixels: int) -> tuple[list[Tensor], list[Tensor]]:
        """The same from mean and biased variance (N, C) of the instances."""
        var_in = var_in * (pixels / max(1, pixels - 1))
        # Variances within instances plus the variance of their means, not a difference of squares, which would cancel.
        mean_ln = mean_in.mean(1, keepdim=True)
        var_ln = (var_in + (mean_in - mean_ln).square()).mean(1, keepdim=True)
        if not self.using_bn:
            return [mean_in, mean_ln], [var_in, var_ln]
        if not self.training:
            # Copies, as the mixture is differentiated, perhaps after a training pass has changed the buffers.
            return [mean_in, mean_ln, self.running_mean.clone()[None]], [var_in, var_ln, self.running_var.clone()[None]]
        count = self._sum(mean_in.new_full((1, 1), len(mean_in)))
        mean_bn = self._sum(mean_in.sum(0, keepdim=True)) / count
        var_bn = self._sum((var_in + (mean_in - mean_bn).square()).sum(0, keepdim=True)) / count
        self._track(mean_bn.detach()[0], var_bn.detach()[0])
        return [mean_in, mean_ln, mean_bn], [var_in, var_ln, var_bn]

    def _sum(self, x: Tensor) -> Tensor:
        """The sum over whatever shares batch statistics with this process."""
        return x

    def _track(self, mean: Tensor, var: Tensor) -> None:
        counts = mean.isfinite().all()  # an empty batch has none; a tensor, so that nobody waits for a GPU
        self.num_batches_tracked.add_(counts)
        if self.using_moving_average:
            new_mean = self.running_mean.lerp(mean.to(self.running_mean.dtype), self.momentum)
            new_var = self.running_var.lerp(var.to(self.running_var.dtype), self.momentum)
        else:
            share = 1 / self.num_batches_tracked.to(mean.dtype)
            old_square = self.running_var + self.running_mean.square()
            square = old_square + (var + mean.square() - old_square) * share
            new_mean = self.running_mean + ((mean - self.running_mean) * share).to(self.running_mean.dtype)
            new_var = square - new_mean.square()
        self.running_mean.copy_(new_mean.where(counts, self.running_mean))
        self.running_var.copy_(new_var.where(counts, self.running_var))

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        for name in ('weight', 'bias', 'running_mean', 'running_var'):
            value = state_dict.get(prefix + name)
            if value is not None and value.numel() == self.num_features and value.dim() > 1:
                state_dict[prefix + name] = value.flatten()
        if self.using_bn:  # the official files have no counter
            state_dict.setdefault(prefix + 'num_batches_tracked', self.num_batches_tracked)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        text = f'{self.num_features}, eps={self.eps}, momentum={self.momentum}, mixes={"+".join(self.kinds)}'
        options = dict(using_moving_average=False, last_gamma=True)
        text += ''.join(f', {name}={value}' for name, value in options.items() if getattr(self, name) == value)
        return text if self.weight is not None else f'{text}, affine=False'


class SN1d(_SwitchableNorm):
    """Switchable norm of (N, C). One value per instance has no instance statistics: LN and BN are mixed.

    Their variances are unbiased, as in the official code.
    """

    input_dim = 2

    @property
    def kinds(self) -> list[str]:
        return ['LN', 'BN'] if self.using_bn else ['LN']

    def _statistics(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        var_ln, mean_ln = torch.var_mean(x, 1, keepdim=True)
        if not self.using_bn:
            return [mean_ln], [var_ln]
        mean_bn, var_bn = self.running_mean.clone()[None], self.running_var.clone()[None]
        if self.training:
            if len(x) == 1:
                raise ValueError(f'SN1d: input must have more than one sample in training mode, got {tuple(x.shape)}')
            var_bn, mean_bn = torch.var_mean(x, 0, keepdim=True)
            self._track(mean_bn.detach()[0], var_bn.detach()[0])
        return [mean_ln, mean_bn], [var_ln, var_bn]


class SN2d(_SwitchableNorm):
    """Switchable norm of (N, C, H, W): ``norm_cfg=dict(type='SN')``."""

    input_dim = 4

    def statistics(self, x: Tensor) -> tuple[Map, Tensor, Tensor]:
        """As :func:`bnet_mm.layers.normalizers.statistics`."""
        self._check_input(x)
        pixels = x.shape[2] * x.shape[3]
        maps, mean_in, var_in = fused_moments(x, over_batch=False)
        return maps, *self._mix(*self._statistics_from(mean_in, var_in, pixels))


class SN3d(_SwitchableNorm):
    """Switchable norm of (N, C, T, H, W)."""

    input_dim = 5


class SyncSN(SN2d):
    """SN2d whose batch statistics are those of the joined batch of all processes, of any sizes."""

    def _sum(self, x: Tensor) -> Tensor:
        return x if world_size(None) == 1 else SumOverProcesses.apply(x, dist.group.WORLD)
