"""Cross-iteration batch norm (Yao et al., "Cross-Iteration Batch Normalization", arXiv 2002.05712).

Differences from the official code: eps is added to the variance, as in the paper's equations, not to the standard
deviation; the history is part of the state dict, so that a resumed run goes on as it was; nothing is sent to a GPU by
the constructor; and plain batch norm (biased variance) is used where no history is. From the official code, against
the paper's clipping (eq. 11): a past iteration whose compensated variance is negative is left out for that channel.
"""

from __future__ import annotations

import math
from numbers import Integral, Real

import torch
from torch import Tensor, nn

from bnet_mm.layers.arguments import check_positive_int
from bnet_mm.layers.sync_batch_norm import update_running_statistics

# One entry per past forward pass, newest first. Shapes (T, C) for the first two, (T, *weight.shape) for the others.
# Tensors of the state dict, but no buffers: their length changes, and moving averages of models, DDP and the like
# copy buffers between processes and models.
HISTORY = ('past_mean', 'past_var', 'past_weight', 'past_mean_slope', 'past_var_slope')


class CBN(nn.modules.batchnorm._BatchNorm):
    """Batch norm over the last ``buffer_num`` iterations and the present one.

    A past mean mu and mean square nu are moved to the present weight w of the convolution (or linear layer) before this
    norm, to first order, per output channel c (paper, eqs. 7 to 10)::

        mu_c' = mu_c + <d mu_c / d w_c, w_c - w_c(then)>, and likewise nu_c'

    and are averaged with the present ones; the variance is the average nu less the square of the average mu. (Kept are
    mu and the variance v: nu' - mu'^2 = v + <dv/dw, change> - <dmu/dw, change>^2 does not cancel.) Running statistics
    take the present batch only. Plain batch norm is used during burn-in, in evaluation, and where the input needs no
    gradient.

    The convolution is the one that the module that holds this layer registered before it (as in ``ConvModule``); for
    another one call :meth:`follow`. Each forward pass in training is one iteration: with gradient accumulation, passes
    with the same weights are combined without compensation, since none is needed. Changes of the convolution's bias are
    not compensated. Processes keep their own history; a checkpoint holds that of the first. ``convert_sync_batchnorm``
    (the runner's ``sync_bn``) makes a SyncBatchNorm of this layer, as of any batch norm; inside BNET it stays CBN.

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
        RuntimeError: In training, if ``burnin`` is set and nobody tells the epoch, if there is no convolution, or under
            activation checkpointing (``with_cp``), which would count each iteration twice.
    """

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
        self._chosen = False
        self._history: dict[str, Tensor] = {}

    def follow(self, convolution: nn.Module) -> None:
        """Compensate for the changes of this layer's weight, which must be (num_features, ...).

        Raises:
            ValueError: If the weight has another number of output channels, or is that of a transposed convolution.
        """
        if not self._fits(convolution):
            raise ValueError(
                f'CBN: the layer before must have a weight ({self.num_features}, ...), one row per output channel, '
                f'got {convolution}'
            )
        self._convolution, self._chosen = (convolution,), True

    def follow_registered(self, convolution: nn.Module) -> None:
        """Follow the convolution that was registered before this layer, if it fits and nobody chose another."""
        if not self._chosen and self._fits(convolution):
            self._convolution = (convolution,)

    def follow_same(self, other: CBN) -> None:
        """Follow the convolution of ``other``, of which this is a copy."""
        self._convolution, self._chosen = other._convolution, other._chosen

    def _fits(self, convolution: nn.Module) -> bool:
        return len(convolution.weight) == self.num_features and not getattr(convolution, 'transposed', False)

    def set_epoch(self, epoch: float) -> None:
        """Tell how many epochs of training are done, for ``burnin``."""
        self._epoch = epoch

    def _check_input_dim(self, x: Tensor) -> None:
        if x.dim() < 2:
            raise ValueError(f'CBN: input must be (N, C, ...), got shape {tuple(x.shape)}')

    def forward(self, x: Tensor) -> Tensor:
        if not self._uses_history(x):
            return super().forward(x)
        dims, shape = [0, *range(2, x.dim())], [1, -1] + [1] * (x.dim() - 2)
        count = x.numel() // x.shape[1]
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        var, mean = torch.var_mean(wide, dims, correction=0)
        means, variances = self._join_past(mean, var)
        valid = variances.detach() >= 0
        number = valid.sum(0)
        joint_mean = means.where(valid, 0.0).sum(0) / number
        joint_var = (variances + (means - joint_mean).square()).where(valid, 0.0).sum(0) / number
        self._remember(mean, var, count)
        if self.track_running_stats:
            update_running_statistics(self, mean, var * (count / (count - 1)))
        scale = (joint_var + self.eps).rsqrt()
        shift = -joint_mean * scale
        if self.affine:
            scale, shift = scale * self.weight, shift * self.weight + self.bias
        return torch.addcmul(shift.view(shape), wide, scale.view(shape)).to(x.dtype)

    def _uses_history(self, x: Tensor) -> bool:
        self._check_input_dim(x)
        if not (self.training and x.requires_grad and torch.is_grad_enabled() and self.buffer_num):
            return False
        if x.numel() <= x.shape[1]:  # empty, or one value per channel: as batch norm has it
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
        if torch._C._current_graph_task_id() != -1:  # within a backward pass
            raise RuntimeError('CBN: activation checkpointing (with_cp) runs it twice in an iteration; switch it off')
        return True

    def _join_past(self, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        """Means and variances of the present and of the compensated past iterations, (T + 1, C) each."""
        if not self._history:
            return mean[None], var[None]
        past = {name: value[: self.buffer_num].to(mean) for name, value in self._history.items()}
        change = (self._convolution[0].weight.detach() - past['past_weight']).flatten(2)
        mean_change = (past['past_mean_slope'].flatten(2) * change).sum(2)
        var_change = (past['past_var_slope'].flatten(2) * change).sum(2) - mean_change.square()
        means = torch.cat([mean[None], past['past_mean'] + mean_change])
        return means, torch.cat([var[None], past['past_var'] + var_change])

    def _remember(self, mean: Tensor, var: Tensor, count: int) -> None:
        """Put the present iteration in front of the history and drop the oldest."""
        weight = self._convolution[0].weight
        if weight.requires_grad:
            # Channel c's statistics depend on row c of the weight only, so the gradient of their sum holds them all.
            # The power of two keeps float16 from underflow (1 / count) and from overflow (sums over count values).
            factor = 2.0 ** round(math.log2(count) / 2)
            options = dict(retain_graph=True, allow_unused=True)
            (slope,) = torch.autograd.grad(mean.sum() * factor, weight, **options)
            (var_slope,) = torch.autograd.grad(var.sum() * factor, weight, **options)
            if slope is None:
                raise RuntimeError(
                    f'CBN: the input does not come from the convolution that was registered before this layer, '
                    f'{self._convolution[0]}; name the right one with follow(convolution)'
                )
            slope, var_slope = slope / factor, var_slope / factor
        else:  # a frozen weight does not change
            slope = var_slope = torch.zeros_like(weight)
        for name, value in zip(HISTORY, (mean, var, weight, slope, var_slope)):
            value, past = value.detach()[None].to(mean.dtype), self._history.get(name)
            kept = [] if past is None else [past[: self.buffer_num - 1].to(value)]
            self._history[name] = torch.cat([value, *kept])

    def _apply(self, fn, *args, **kwargs):
        self._history = {name: fn(value) for name, value in self._history.items()}
        return super()._apply(fn, *args, **kwargs)

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update({prefix + name: value for name, value in self._history.items()})

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        history = {name: state_dict.pop(prefix + name) for name in HISTORY if prefix + name in state_dict}
        if history or prefix + 'running_mean' in state_dict:  # a BN checkpoint has none, and starts a new one
            self._history = {name: value.clone() for name, value in history.items()}
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f'{super().extra_repr()}, buffer_num={self.buffer_num}, burnin={self.burnin}'
