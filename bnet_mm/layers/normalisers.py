"""The normalisers that BNET can hold: each without its affine, which the depthwise transform replaces."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, Union

import torch
from torch import Tensor, nn

from bnet_mm.layers.affine_free import AffineFreeGroupNorm, AffineFreeInstanceNorm2d, add_stand_ins
from bnet_mm.layers.arguments import Duck
from bnet_mm.layers.cross_iteration_bn import CBN
from bnet_mm.layers.statistics import (
    batch_norm,
    running_statistics,
    take_statistics,
    update_running_statistics,
    uses_batch_statistics,
    whole_norm,
)
from bnet_mm.layers.switchable_norm import SN2d, SyncSN
from bnet_mm.layers.sync_batch_norm import SyncBatchNorm
from bnet_mm.ops.bnet import Map, fused_moments

if TYPE_CHECKING:
    from typing_extensions import TypeGuard


class AffineFreeBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d that only normalises; ``weight`` and ``bias`` are stand-ins, see :func:`add_stand_ins`.

    Args and shapes: As BatchNorm2d, without ``affine``.
    """

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float | None = 0.1, **options: Any) -> None:
        super().__init__(num_features, eps, momentum, affine=False, **options)
        add_stand_ins(self, num_features)

    def forward(self, x: Tensor) -> Tensor:
        return batch_norm(self, x, None, None)

    def statistics(self, x: Tensor) -> tuple[Tensor | Map, Tensor, Tensor]:
        """As :func:`statistics`."""
        if not uses_batch_statistics(self):
            return x, *running_statistics(self)
        maps, mean, var = fused_moments(x, over_batch=True)
        if self.training and self.track_running_stats:
            count = x.numel() // x.shape[1]
            update_running_statistics(self, mean, var * (count / (count - 1)))
        return maps, mean, var


Normaliser = Union[AffineFreeBatchNorm2d, SyncBatchNorm, AffineFreeGroupNorm, AffineFreeInstanceNorm2d, SN2d, CBN]
NORMALISERS: dict[str, type[Normaliser]] = {
    'BN': AffineFreeBatchNorm2d, 'SyncBN': SyncBatchNorm, 'GN': AffineFreeGroupNorm, 'IN': AffineFreeInstanceNorm2d,
    'SN': SN2d, 'SyncSN': SyncSN, 'CBN': CBN,
}  # fmt: skip
OF_TORCH = (nn.BatchNorm2d, nn.SyncBatchNorm, nn.GroupNorm, nn.InstanceNorm2d)
# The options of BNET itself that each kind takes; the others keep their own defaults.
RUNNING = ('momentum', 'track_running_stats')
TAKES = {'BN': RUNNING, 'SyncBN': RUNNING, 'CBN': RUNNING, 'SN': ('momentum',), 'SyncSN': ('momentum',)}
DEFAULTS = dict(momentum=0.1, track_running_stats=True)


def build_normaliser(cfg: str | dict[str, Any], num_features: int, options: dict[str, Any]) -> Normaliser:
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
    if kind not in NORMALISERS:
        raise ValueError(
            f'BNET: norm must be one of {", ".join(NORMALISERS)}, or a dict with such a type, got {kind!r}'
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
    if kind in ('SN', 'SyncSN', 'CBN'):
        cfg['affine'] = False
    try:
        return NORMALISERS[kind](**cfg)
    except (TypeError, ValueError) as error:
        raise ValueError(f'BNET: norm={kind!r}: {error}') from error


def has_hooks(module: nn.Module) -> bool:
    """Whether a call of this module does more than its class says."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or 'forward' in module.__dict__
    )


def statistics(norm: Duck, x: Tensor) -> tuple[Tensor | Map, Tensor, Tensor] | None:
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
    if isinstance(norm, nn.InstanceNorm2d):
        single = x[0, 0].numel() == 1
        return None if single or norm.track_running_stats else fused_moments(x, over_batch=False)
    return norm.statistics(x) if hasattr(norm, 'statistics') else None


def statistics_of_whole_norm(
    norm: Duck, x: Tensor, *parameters: Tensor
) -> tuple[Tensor | None, Tensor | None, bool, float, float] | None:
    """:func:`whole_norm` for batch norms of one process in eager mode; None for everything else."""
    if type(norm) not in (AffineFreeBatchNorm2d, SyncBatchNorm) or torch.compiler.is_compiling():
        return None
    if has_hooks(norm) or norm._parameters.get('weight') is not None:  # its own affine, put there by hand
        return None
    if isinstance(norm, SyncBatchNorm) and not norm.is_local(x):
        return None
    return whole_norm(norm, x.dtype, *parameters)


def _group_statistics(norm: nn.GroupNorm, x: Tensor) -> tuple[Map, Tensor, Tensor]:
    maps, mean, var = fused_moments(x, over_batch=False)
    means, variances = mean.unflatten(1, (norm.num_groups, -1)), var.unflatten(1, (norm.num_groups, -1))
    group_mean = means.mean(2, keepdim=True)
    # Variance within the channels plus that of their means, not a difference of squares, which would cancel.
    group_var = (variances + (means - group_mean).square()).mean(2, keepdim=True)
    return maps, group_mean.expand_as(means).flatten(1), group_var.expand_as(means).flatten(1)


def is_foreign_sync_batch_norm(module: nn.Module | None) -> TypeGuard[Duck]:
    """Whether this is torch's or mmcv's SyncBatchNorm (mmcv's is found by name: mmcv need not be installed)."""
    return type(module).__name__ == 'SyncBatchNorm' and not isinstance(module, SyncBatchNorm)


def can_be_normaliser(norm: nn.Module) -> bool:
    """Whether BNET can hold this norm: exactly one of these kinds. A subclass may do more than normalise."""
    kinds = (nn.BatchNorm2d, nn.GroupNorm, nn.InstanceNorm2d, *NORMALISERS.values())
    return type(norm) in kinds or type(norm).__name__ == '_BatchNormXd' or is_foreign_sync_batch_norm(norm)


def without_affine(norm: Duck) -> Normaliser:
    """A copy of ``norm`` that only normalises, with its statistics and mode; SyncBatchNorm becomes ours.

    Raises:
        ValueError: If this is no norm that BNET can hold.
    """
    if not can_be_normaliser(norm):
        raise ValueError(
            f'BNET: norm must be one of {", ".join(kind.__name__ for kind in OF_TORCH)}, SN2d, SyncSN, CBN, and not a '
            f'subclass, which may do more, got {type(norm).__name__}'
        )
    if is_foreign_sync_batch_norm(norm):
        return SyncBatchNorm.from_host(norm)
    if isinstance(norm, (SN2d, CBN)):
        twin: Duck = copy.deepcopy(norm)
        twin.affine = False
        add_stand_ins(twin, norm.num_features)
        if isinstance(norm, CBN):
            twin.follow_same(norm)
        return twin
    if isinstance(norm, nn.GroupNorm):
        return AffineFreeGroupNorm(norm.num_groups, norm.num_channels, norm.eps).train(norm.training)
    kind = AffineFreeInstanceNorm2d if isinstance(norm, nn.InstanceNorm2d) else AffineFreeBatchNorm2d
    options = dict(track_running_stats=norm.track_running_stats)
    return take_statistics(kind(norm.num_features, norm.eps, norm.momentum, **options), norm)


def with_affine(normaliser: Normaliser, weight: nn.Parameter, bias: nn.Parameter) -> nn.Module:
    """The norm that normalises as ``normaliser``, with this weight (C,) and bias (C,); torch's where there is one."""
    norm: Duck = _without_stand_ins(normaliser)
    if isinstance(normaliser, CBN):
        norm.follow_same(normaliser)
    norm.weight, norm.bias = weight, bias
    return norm


def _without_stand_ins(normaliser: Normaliser) -> nn.Module:
    if isinstance(normaliser, (SN2d, CBN)):
        norm = copy.deepcopy(normaliser)
        norm.affine = True
        return norm
    if isinstance(normaliser, nn.GroupNorm):
        return nn.GroupNorm(normaliser.num_groups, normaliser.num_channels, normaliser.eps).train(normaliser.training)
    kind: type[nn.InstanceNorm2d | nn.SyncBatchNorm | nn.BatchNorm2d]
    if isinstance(normaliser, nn.InstanceNorm2d):
        kind = nn.InstanceNorm2d
    else:
        kind = nn.SyncBatchNorm if isinstance(normaliser, SyncBatchNorm) else nn.BatchNorm2d
    options: tuple = (normaliser.eps, normaliser.momentum, True, normaliser.track_running_stats)
    plain: Duck = take_statistics(kind(normaliser.num_features, *options), normaliser)
    if isinstance(normaliser, SyncBatchNorm):
        plain.process_group = normaliser.process_group
    return plain
