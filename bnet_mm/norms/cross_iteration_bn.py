"""Cross-iteration batch norm (Yao et al., "Cross-Iteration Batch Normalization", arXiv 2002.05712).

Differences from the official code: eps is added to the variance, as in the paper's equations, not to the standard
deviation; the history is part of the state dict, so that a resumed run goes on as it was; nothing is sent to a GPU by
the constructor; and plain batch norm (biased variance) is used where no history is. From the official code, against
the paper's clipping (eq. 11): a past iteration whose compensated variance is negative is left out for that channel.
"""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import Tensor, nn

from bnet_mm.norms.arguments import check_positive_int
from bnet_mm.norms.sync_batch_norm import update_running_statistics

# One entry per past forward pass, newest first. Shapes (T, C) for the first two, (T, *weight.shape) for the others.
HISTORY = ('past_mean', 'past_mean_square', 'past_weight', 'past_mean_slope', 'past_mean_square_slope')


class CBN(nn.modules.batchnorm._BatchNorm):
    """Batch norm over the last ``buffer_num`` iterations and the present one.

    A past mean and mean square are moved to the present weights w of the convolution (or linear layer) before this
    norm, to first order, per output channel c (paper, eqs. 7 to 10)::

        mean_c' = mean_c + <d mean_c / d w_c, w_c - w_c(then)>

    and are averaged with the present ones; the variance is the average mean square less the squared average mean.
    Running statistics take the present batch only. Plain batch norm is used during burn-in, in evaluation, and where
    the input needs no gradient.

    The convolution is the one that the module that holds this layer registered before it (as in ``ConvModule``); for
    another one call :meth:`follow`. Each forward pass in training is one iteration: with gradient accumulation, passes
    with the same weights are combined without compensation, since none is needed. Processes keep their own history; a
    checkpoint holds that of the first.

    Args:
        num_features: Number of channels C.
        eps, momentum, affine, track_running_stats: As in ``torch.nn.BatchNorm2d``.
        buffer_num: Number of past iterations to use.
        burnin: Epochs before they are used. Needs ``custom_hooks=[dict(type='CBNBurnIn')]`` in the config, or calls of
            :meth:`set_epoch` in other training loops.

    Shapes:
        input and output: (N, C, ...).

    Raises:
        ValueError: For arguments outside these.
        RuntimeError: In training, if ``burnin`` is set and nobody tells the epoch, or if there is no convolution.
    """

    past_mean: Tensor
    past_mean_square: Tensor
    past_weight: Tensor
    past_mean_slope: Tensor
    past_mean_square_slope: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        buffer_num: int = 3,
        burnin: float = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_positive_int('CBN', 'num_features', num_features)
        if not isinstance(buffer_num, Integral) or isinstance(buffer_num, bool) or buffer_num < 0:
            raise ValueError(f'CBN: buffer_num must be a number of past iterations, 0 or more, got {buffer_num!r}')
        if not isinstance(burnin, Real) or isinstance(burnin, bool) or not burnin >= 0:
            raise ValueError(f'CBN: burnin must be a number of epochs, 0 or more, got {burnin!r}')
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        self.buffer_num, self.burnin = buffer_num, burnin
        self._epoch: float | None = None
        self._convolution: tuple[nn.Module, ...] = ()  # in a tuple, so that it does not become a child
        for name in HISTORY:
            self.register_buffer(name, torch.empty(0, device=device, dtype=dtype))

    def follow(self, convolution: nn.Module) -> None:
        """Compensate for the changes of this layer's weight, which must be (num_features, ...).

        Raises:
            ValueError: If the weight has another number of output channels, or is that of a transposed convolution.
        """
        outputs = len(convolution.weight)
        if outputs != self.num_features or getattr(convolution, 'transposed', False):
            raise ValueError(
                f'CBN: the layer before must have a weight ({self.num_features}, ...), one row per output channel, '
                f'got {convolution}'
            )
        self._convolution = (convolution,)

    def follow_same(self, other: CBN) -> None:
        """Compensate for the same layer as ``other``, of which this is a copy."""
        self._convolution = other._convolution

    def set_epoch(self, epoch: float) -> None:
        """Tell how many epochs of training are done, for ``burnin``."""
        self._epoch = epoch

    def _check_input_dim(self, x: Tensor) -> None:
        if x.dim() < 2:
            raise ValueError(f'CBN: input must be (N, C, ...), got shape {tuple(x.shape)}')

    def forward(self, x: Tensor) -> Tensor:
        if not self._uses_history(x):
            return super().forward(x)
        self._check_input_dim(x)
        dims, shape = [0, *range(2, x.dim())], [1, -1] + [1] * (x.dim() - 2)
        count = x.numel() // x.shape[1]
        if count < 2:
            raise ValueError(f'CBN: input must have more than one value per channel, got shape {tuple(x.shape)}')
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        var, mean = torch.var_mean(wide, dims, correction=0)
        mean_square = var + mean.square()
        all_means, all_squares = self._join_past(mean, mean_square)
        valid = all_squares.detach() >= all_means.detach().square()
        valid[0] = True  # the present one, whatever rounding says
        number = valid.sum(0)
        joint_mean = all_means.where(valid, 0.0).sum(0) / number
        joint_var = (all_squares.where(valid, 0.0).sum(0) / number - joint_mean.square()).clamp_min(0)
        self._remember(mean, mean_square, count)
        if self.track_running_stats:
            update_running_statistics(self, mean, var * (count / (count - 1)))
        scale = (joint_var + self.eps).rsqrt()
        shift = -joint_mean * scale
        if self.affine:
            scale, shift = scale * self.weight, shift * self.weight + self.bias
        return torch.addcmul(shift.view(shape), wide, scale.view(shape)).to(x.dtype)

    def _uses_history(self, x: Tensor) -> bool:
        if not (self.training and x.requires_grad and torch.is_grad_enabled() and self.buffer_num):
            return False
        if self.burnin and self._epoch is None:
            raise RuntimeError(
                f'CBN: burnin={self.burnin} epochs, and nobody tells the epoch: add '
                "custom_hooks=[dict(type='CBNBurnIn')] to the config, or call set_epoch()"
            )
        if self.burnin and self._epoch < self.burnin:
            return False
        if not self._convolution:
            raise RuntimeError(
                'CBN: no convolution is known before this layer; put it into a module after its convolution (as '
                'ConvModule and nn.Sequential do), or call follow(convolution)'
            )
        return True

    def _join_past(self, mean: Tensor, mean_square: Tensor) -> tuple[Tensor, Tensor]:
        """The present statistics and the compensated past ones, (T + 1, C) each."""
        past = self.past_mean[: self.buffer_num]
        if not len(past):
            return mean[None], mean_square[None]
        change = (self._convolution[0].weight.detach() - self.past_weight).flatten(2)
        means = past + (self.past_mean_slope.flatten(2) * change).sum(2)
        squares = self.past_mean_square + (self.past_mean_square_slope.flatten(2) * change).sum(2)
        return torch.cat([mean[None], means]), torch.cat([mean_square[None], squares])

    def _remember(self, mean: Tensor, mean_square: Tensor, count: int) -> None:
        """Put the present iteration in front of the history and drop the oldest."""
        weight = self._convolution[0].weight
        if weight.requires_grad:
            # Channel c's statistics depend on row c of the weight only, so the gradient of their sum holds them all.
            # The power of two keeps float16 from underflow (1 / count) and from overflow (sums over count values).
            factor = 2.0 ** round(math.log2(count) / 2)
            try:
                (slope,) = torch.autograd.grad(mean.sum() * factor, weight, retain_graph=True)
                (square_slope,) = torch.autograd.grad(mean_square.sum() * factor, weight, retain_graph=True)
            except RuntimeError as error:
                raise RuntimeError(
                    f'CBN: the input does not come from the convolution that was registered before this layer, '
                    f'{self._convolution[0]}; name the right one with follow(convolution)'
                ) from error
            slope, square_slope = slope / factor, square_slope / factor
        else:  # a frozen weight does not change
            slope = square_slope = torch.zeros_like(weight)
        present = (mean.detach(), mean_square.detach(), weight.detach(), slope, square_slope)
        for name, value in zip(HISTORY, present):
            past = getattr(self, name)
            value = value[None].to(past.dtype)
            setattr(self, name, torch.cat([value, past[: self.buffer_num - 1]]) if len(past) else value.clone())

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        for name in HISTORY:  # of any length; a BN checkpoint has none
            value = state_dict.setdefault(prefix + name, torch.empty(0))
            setattr(self, name, torch.empty_like(value, device=getattr(self, name).device))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f'{super().extra_repr()}, buffer_num={self.buffer_num}, burnin={self.burnin}'


class CBNBurnIn(Hook):
    """Tells every CBN layer the epoch, so that ``burnin`` works: ``custom_hooks=[dict(type='CBNBurnIn')]``.

    An epoch is one pass over the training data loader, also where the loop counts iterations.
    """

    def before_train(self, runner: Runner) -> None:
        self._layers = [module for module in runner.model.modules() if isinstance(module, CBN)]

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        epoch = runner.iter / len(runner.train_dataloader)
        for layer in self._layers:
            layer.set_epoch(epoch)
