"""The normalisers that BNET can hold: each without its affine, which the depthwise transform replaces."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from bnet_mm.layers.cross_iteration_bn import CBN
from bnet_mm.layers.switchable_norm import SN2d, SyncSN
from bnet_mm.layers.sync_batch_norm import SyncBatchNorm, batch_norm, update_running_statistics
from bnet_mm.ops.bnet import Map, fused_moments


class AffineFreeBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d that only normalises, and survives hosts that write to the weight of every BatchNorm2d.

    ``weight`` and ``bias`` read as fresh ones and zeros: filling or freezing them changes nothing, where the None of
    ``affine=False`` would stop the host (PIDNet, CenterNet, Conformer, ``partial_bn``).

    Args and shapes: As BatchNorm2d, without ``affine``.
    """

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float | None = 0.1, **options: Any) -> None:
        super().__init__(num_features, eps, momentum, affine=False, **options)
        # torch.fx traces through modules that are not torch's own, and would fix the training flag of this one.
        self.__module__ = nn.BatchNorm2d.__module__

    def __getattr__(self, name: str) -> Any:
        if name in ('weight', 'bias') and name in self.__dict__.get('_parameters', ()):
            kind = torch.empty(0) if self.running_mean is None else self.running_mean
            return kind.new_full((self.num_features,), float(name == 'weight'))
        return super().__getattr__(name)

    def forward(self, x: Tensor) -> Tensor:
        return batch_norm(self, x)

    def statistics(self, x: Tensor) -> tuple[Tensor | Map, Tensor, Tensor]:
        """As :func:`statistics`."""
        if not self.training and self.running_mean is not None:
            return x, self.running_mean, self.running_var
        maps, mean, var = fused_moments(x, over_batch=True)
        if self.training and self.track_running_stats:
            count = x.numel() // x.shape[1]
            update_running_statistics(self, mean, var * (count / (count - 1)))
        return maps, mean, var


NORMALIZERS = {
    'BN': AffineFreeBatchNorm2d, 'SyncBN': SyncBatchNorm, 'GN': nn.GroupNorm, 'IN': nn.InstanceNorm2d, 'SN': SN2d,
    'SyncSN': SyncSN, 'CBN': CBN,
}  # fmt: skip
# The options of BNET itself that each kind takes; the others keep their own defaults.
RUNNING = ('momentum', 'track_running_stats')
TAKES = {'BN': RUNNING, 'SyncBN': RUNNING, 'CBN': RUNNING, 'SN': ('momentum',), 'SyncSN': ('momentum',)}
DEFAULTS = dict(momentum=0.1, track_running_stats=True)


def build_normalizer(cfg: str | dict[str, Any], num_features: int, options: dict[str, Any]) -> nn.Module:
    """Build a normaliser without affine.

    Args:
        cfg: Its type, or a dict of type and options.
        num_features: Number of channels.
        options: eps, momentum and track_running_stats of BNET, for what ``cfg`` does not say.

    Raises:
        ValueError: For an unknown type or option, or an option of BNET that this type would ignore.
    """
    cfg = dict(cfg) if isinstance(cfg, dict) else dict(type=cfg)
    kind = cfg.pop('type', None)
    if kind not in NORMALIZERS:
        raise ValueError(
            f'BNET: norm must be one of {", ".join(NORMALIZERS)}, or a dict with such a type, got {kind!r}'
        )
    for name, default in DEFAULTS.items():
        if name in TAKES.get(kind, ()):
            cfg.setdefault(name, options[name])
        elif options[name] != default:
            raise ValueError(f'BNET: {name}={options[name]!r} has no meaning for norm={kind!r}')
    cfg.setdefault('eps', options['eps'])
    for name in ('affine', 'num_features', 'num_channels'):
        if name in cfg:
            raise ValueError(f'BNET: norm takes no {name}: BNET has the channels and, in its place, the affine')
    cfg['num_channels' if kind == 'GN' else 'num_features'] = num_features
    if kind not in ('BN', 'SyncBN'):
        cfg['affine'] = False
    try:
        return NORMALIZERS[kind](**cfg)
    except (TypeError, ValueError) as error:
        raise ValueError(f'BNET: norm={kind!r}: {error}') from error


def has_hooks(module: nn.Module) -> bool:
    """Whether a call of this module does more than its class says."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or 'forward' in module.__dict__


def statistics(norm: nn.Module, x: Tensor) -> tuple[Tensor | Map, Tensor, Tensor] | None:
    """What a normaliser without affine would normalise x (N, C, H, W) with, for the kernels of :mod:`bnet_mm.ops`.

    Running statistics are updated as by a forward pass of ``norm``.

    Returns:
        The map for the kernels, mean and variance, (C,) or (N, C); None if ``norm`` has to be run as a module: it has
        hooks or an affine, statistics that depend on more than x, or refuses single values.
    """
    if has_hooks(norm) or norm._parameters.get('weight') is not None:  # its own affine, put there by hand
        return None
    if isinstance(norm, nn.GroupNorm):
        single = x[0].numel() == norm.num_groups
        return None if single else _group_statistics(norm, x)
    if type(norm) is nn.InstanceNorm2d:
        single = x[0, 0].numel() == 1
        return None if single or norm.track_running_stats else fused_moments(x, over_batch=False)
    return norm.statistics(x) if hasattr(norm, 'statistics') else None


def _group_statistics(norm: nn.GroupNorm, x: Tensor) -> tuple[Map, Tensor, Tensor]:
    maps, mean, var = fused_moments(x, over_batch=False)
    means, variances = mean.unflatten(1, (norm.num_groups, -1)), var.unflatten(1, (norm.num_groups, -1))
    group_mean = means.mean(2, keepdim=True)
    # Variance within the channels plus that of their means, not a difference of squares, which would cancel.
    group_var = (variances + (means - group_mean).square()).mean(2, keepdim=True)
    return maps, group_mean.expand_as(means).flatten(1), group_var.expand_as(means).flatten(1)


def is_foreign_sync_batch_norm(module: nn.Module | None) -> bool:
    """Whether this is torch's or mmcv's SyncBatchNorm (mmcv's is found by name: mmcv need not be installed)."""
    return type(module).__name__ == 'SyncBatchNorm' and not isinstance(module, SyncBatchNorm)


def can_be_normalizer(norm: nn.Module) -> bool:
    """Whether BNET can hold this norm: exactly one of these kinds. A subclass may do more than normalise."""
    kinds = (nn.BatchNorm2d, *NORMALIZERS.values())
    return type(norm) in kinds or type(norm).__name__ == '_BatchNormXd' or is_foreign_sync_batch_norm(norm)


def without_affine(norm: nn.Module) -> nn.Module:
    """A copy of ``norm`` that only normalises, with its statistics and mode; SyncBatchNorm becomes ours.

    Raises:
        ValueError: If this is no norm that BNET can hold.
    """
    if not can_be_normalizer(norm):
        raise ValueError(
            f'BNET: norm must be one of {", ".join(kind.__name__ for kind in NORMALIZERS.values())}, and not a '
            f'subclass, which may do more, got {type(norm).__name__}'
        )
    if is_foreign_sync_batch_norm(norm):
        return SyncBatchNorm.from_host(norm)
    if type(norm) is nn.BatchNorm2d or type(norm).__name__ == '_BatchNormXd':  # a reverted SyncBatchNorm
        options = dict(track_running_stats=norm.track_running_stats)
        return _take_over(AffineFreeBatchNorm2d(norm.num_features, norm.eps, norm.momentum, **options), norm)
    twin = copy.deepcopy(norm)
    twin.weight = twin.bias = None
    twin.affine = False
    if isinstance(norm, CBN):
        twin.follow_same(norm)
    return twin


def with_affine(normalizer: nn.Module, weight: Tensor, bias: Tensor) -> nn.Module:
    """A copy of ``normalizer`` with this weight (C,) and bias (C,); our batch norms become torch's."""
    torchs = {AffineFreeBatchNorm2d: nn.BatchNorm2d, SyncBatchNorm: nn.SyncBatchNorm}.get(type(normalizer))
    if torchs:
        options = (normalizer.eps, normalizer.momentum, True, normalizer.track_running_stats)
        twin = _take_over(torchs(normalizer.num_features, *options), normalizer)
        if isinstance(normalizer, SyncBatchNorm):
            twin.process_group = normalizer.process_group
    else:
        twin = copy.deepcopy(normalizer)
        twin.affine = True
    if isinstance(normalizer, CBN):
        twin.follow_same(normalizer)
    twin.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
    twin.bias = nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
    return twin


def _take_over(norm: nn.Module, other: nn.Module) -> nn.Module:
    """Give ``norm`` copies of the running statistics of ``other``, on their device, and its mode."""
    for name, value in other.named_buffers():
        setattr(norm, name, value.clone())
    return norm.train(other.training)
