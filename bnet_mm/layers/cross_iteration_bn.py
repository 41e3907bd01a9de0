"""Cross-iteration batch norm (Yao et al., "Cross-Iteration Batch Normalization", arXiv 2002.05712).

Differences from the official code: eps is added to the variance, as in the paper's equations, not to the standard
deviation; the history is part of the state dict, so that a resumed run goes on as it was; nothing is sent to a GPU by
the constructor; and plain batch norm (biased variance) is used where no history is. From the official code, against
the paper's clipping (eq. 11): a past iteration whose compensated variance is negative is left out for that channel.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from bnet_mm.layers.affine_free import add_stand_ins, normalise
from bnet_mm.layers.arguments import Duck, check_positive_int, is_integer, is_lazy, is_real
from bnet_mm.layers.scripting import refuse_scripting
from bnet_mm.layers.statistics import batch_norm, update_running_statistics
from bnet_mm.ops.dispatch import is_exporting
from bnet_mm.ops.schemas import wide_dtype

# What stands side by side of a past iteration: whether there was one (1), mean and variance (C), the weight and the
# slopes of both in it (as many numbers as the weight has, each).
PARTS = ('valid', 'mean', 'var', 'weight', 'mean_slope', 'var_slope')


# The number of the backward pass that runs now, -1 outside of any; torch has no public question for it.
backward_runs = getattr(torch._C, '_current_graph_task_id', lambda: -1)


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
    not compensated. Processes keep their own history; a checkpoint holds that of the first, as the layer's extra state,
    of a shape that never changes. ``convert_sync_batchnorm`` (the runner's ``sync_bn``) makes a SyncBatchNorm of this
    layer, as of any batch norm; inside BNET it stays CBN.

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
        RuntimeError: In training, if ``burnin`` is set and nobody tells the epoch; if there is no convolution, or its
            weight is parametrized; under activation checkpointing (``with_cp``), which would count each iteration
            twice; and in a trace or export, which would keep the history of that moment.
    """

    __prepare_scriptable__ = refuse_scripting

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
        if not is_integer(buffer_num) or buffer_num < 0:
            raise ValueError(f'CBN: buffer_num must be a number of past iterations, 0 or more, got {buffer_num!r}')
        if not is_real(burnin) or isinstance(burnin, bool) or not burnin >= 0:
            raise ValueError(f'CBN: burnin must be a number of epochs, 0 or more, got {burnin!r}')
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        if not affine:
            add_stand_ins(self, num_features)
        self.buffer_num, self.burnin = buffer_num, burnin
        self._epoch: float | None = None
        self._convolution: tuple[Duck, ...] = ()  # in a tuple, so that it does not become a child
        self._chosen = False
        self._history: Tensor | None = None  # (buffer_num, numbers of an iteration, see PARTS), newest first

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

    def follows(self, convolution: nn.Module) -> bool:
        """Whether this layer compensates for the changes of this very module."""
        return convolution in self._convolution

    def follow_same(self, other: CBN) -> None:
        """Follow the convolution of ``other``, of which this is a copy."""
        self._convolution, self._chosen = other._convolution, other._chosen

    def _fits(self, convolution: Duck) -> bool:
        if getattr(convolution, 'transposed', False):
            return False
        return is_lazy(convolution.weight) or len(convolution.weight) == self.num_features

    def set_epoch(self, epoch: float) -> None:
        """Tell how many epochs of training are done, for ``burnin``."""
        self._epoch = epoch

    def _check_input_dim(self, x: Tensor) -> None:
        if x.dim() < 2:
            raise ValueError(f'CBN: input must be (N, C, ...), got shape {tuple(x.shape)}')

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = (self.weight, self.bias) if self.affine else (None, None)
        if not self._uses_history(x):
            return batch_norm(self, x, weight, bias)
        return self._over_iterations(x, weight, bias)

    @torch.compiler.disable  # it runs autograd, which must not be part of a compiled graph
    def _over_iterations(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        self._check_weight()
        count = x.numel() // x.shape[1]
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        var, mean = torch.var_mean(wide, [0, *range(2, x.dim())], correction=0)
        means, variances, valid = self._join_past(mean, var)
        number = valid.sum(0)
        joint_mean = means.where(valid, 0.0).sum(0) / number
        joint_var = (variances + (means - joint_mean).square()).where(valid, 0.0).sum(0) / number
        self._remember(mean, var, count)
        if self.track_running_stats:
            update_running_statistics(self, mean, var * (count / (count - 1)))
        return normalise(wide, joint_mean, joint_var, self.eps, weight, bias).to(x.dtype)

    def _uses_history(self, x: Tensor) -> bool:
        self._check_input_dim(x)
        if not (self.training and x.requires_grad and torch.is_grad_enabled() and self.buffer_num):
            return False
        if x.numel() <= x.shape[1]:  # empty, or one value per channel: as batch norm has it
            return False
        if self.burnin:
            if self._epoch is None:
                raise RuntimeError(
                    f'CBN: burnin={self.burnin} epochs, and nobody tells the epoch: add '
                    "custom_hooks=[dict(type='CBNBurnIn')] to the config, or call set_epoch()"
                )
            if self._epoch < self.burnin:
                return False
        if not self._convolution:
            raise RuntimeError(
                'CBN: no convolution is known before this layer; put it into a module after its convolution (as '
                'ConvModule and nn.Sequential do), or call follow(convolution)'
            )
        if is_parametrized(self._convolution[0], 'weight'):
            raise RuntimeError(
                f'CBN: the weight of the convolution before this layer, {self._convolution[0]}, is parametrized, and '
                'its changes cannot be followed; use BN there, or remove_parametrizations'
            )
        if torch.jit.is_tracing() or is_exporting():
            raise RuntimeError('CBN: no trace or export can keep the history of training; call eval() first')
        if backward_runs() != -1:
            raise RuntimeError('CBN: activation checkpointing (with_cp) runs it twice in an iteration; switch it off')
        return True

    def _check_weight(self) -> None:
        """Raise a RuntimeError if the convolution is sharded apart from this layer (FSDP), where reading it crashes."""
        weight = self._convolution[0].weight
        stored = weight.untyped_storage().nbytes()
        if weight.dim() < 2 or len(weight) != self.num_features or stored < weight.numel() * weight.element_size():
            raise RuntimeError(
                f'CBN: the weight of the convolution before this layer, {self._convolution[0]}, is not there now: it '
                'is sharded apart from this layer. Wrap both in one unit, such as a whole block, or use BN there'
            )

    def _join_past(self, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Means and variances of the present and the compensated past iterations, and which count; (T + 1, C) each."""
        if self._history is None:
            return mean[None], var[None], torch.ones_like(mean, dtype=torch.bool)[None]
        past = self._unpack(self._history[: self.buffer_num].to(mean))
        change = self._convolution[0].weight.detach().to(mean).flatten() - past['weight']
        change = change.unflatten(1, (len(mean), -1))
        mean_change = (past['mean_slope'].view_as(change) * change).sum(2)
        var_change = (past['var_slope'].view_as(change) * change).sum(2) - mean_change.square()
        means = torch.cat([mean[None], past['mean'] + mean_change])
        variances = torch.cat([var[None], past['var'] + var_change])
        there = torch.cat([torch.ones_like(past['valid'][:1]), past['valid']]) > 0
        return means, variances, there & (variances.detach() >= 0)

    def _remember(self, mean: Tensor, var: Tensor, count: int) -> None:
        """Put the present iteration in front of the history and drop the oldest."""
        weight = self._convolution[0].weight
        if weight.requires_grad:
            # Channel c's statistics depend on row c of the weight only, so the gradient of their sum holds them all.
            # The power of two keeps float16 from underflow (1 / count) and from overflow (sums over count values).
            factor = 2.0 ** round(math.log2(count) / 2)
            options: dict[str, Any] = dict(retain_graph=True, allow_unused=True)
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
        parts = (mean.new_ones(1), mean, var, weight, slope, var_slope)
        newest = torch.cat([part.detach().flatten().to(mean.dtype) for part in parts])[None]
        past = self._no_history(mean) if self._history is None else self._history.to(mean)
        self._history = torch.cat([newest, past])[: self.buffer_num]

    def _sizes(self) -> list[int]:
        """How many numbers each of PARTS has; none where the weight is not known yet."""
        if not self._convolution or is_lazy(self._convolution[0].weight):
            return [0] * len(PARTS)
        size = self._convolution[0].weight.numel()
        return [1, self.num_features, self.num_features, size, size, size]

    def _no_history(self, like: Tensor) -> Tensor:
        return like.new_zeros(self.buffer_num, sum(self._sizes()))

    def _unpack(self, history: Tensor) -> dict[str, Tensor]:
        return dict(zip(PARTS, history.split(self._sizes(), 1)))

    def _apply(self, fn, *args, **kwargs):
        self._history = None if self._history is None else fn(self._history)
        return super()._apply(fn, *args, **kwargs)

    def get_extra_state(self) -> Tensor:
        """The history (buffer_num, numbers of an iteration); zeros before there is one."""
        if self._history is not None:
            return self._history
        return self._no_history(self.weight.detach().to(wide_dtype(self.weight.dtype)))

    def set_extra_state(self, state: Tensor) -> None:
        """Take over a history; one of another length is cut or filled up.

        Raises:
            RuntimeError: If it is no tensor, or belongs to a weight of another shape.
        """
        if not isinstance(state, Tensor):
            raise RuntimeError(f'CBN: the history in the checkpoint is a {type(state).__name__}, not a tensor')
        empty = self._no_history(state)
        if state.is_meta or not state.any():  # also that of a layer which knew of no convolution
            self._history = None
        elif state.dim() != 2 or state.shape[1] != empty.shape[1]:
            raise RuntimeError(
                f'CBN: the history in the checkpoint is {tuple(state.shape)}, that of the convolution before this '
                f'layer, {self._convolution[0] if self._convolution else None}, {tuple(empty.shape)}'
            )
        else:
            self._history = torch.cat([state, empty])[: self.buffer_num].clone()

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        old = [state_dict.pop(f'{prefix}past_{name}', None) for name in PARTS[1:]]  # as version 0.1 wrote it
        key = f'{prefix}_extra_state'
        if all(isinstance(part, Tensor) for part in old):
            valid = old[0].new_ones(len(old[0]), 1)
            state_dict[key] = torch.cat([valid, *(part.flatten(1).to(valid.dtype) for part in old)], 1)
        if prefix + 'running_mean' in state_dict:  # a BN checkpoint has no history, and starts a new one
            state_dict.setdefault(key, torch.zeros(0, 0))
        else:
            state_dict.setdefault(key, self.get_extra_state())
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f'{super().extra_repr()}, buffer_num={self.buffer_num}, burnin={self.burnin}'
