"""The normalisers that BNET can hold: each without its affine, which the depthwise transform replaces."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm  # also what a reverted SyncBatchNorm is

from bnet_mm.norms.cross_iteration_bn import CBN
from bnet_mm.norms.switchable_norm import SN2d, SyncSN
from bnet_mm.norms.sync_batch_norm import SyncBatchNorm

NORMALIZERS = {
    'BN': nn.BatchNorm2d, 'SyncBN': SyncBatchNorm, 'GN': nn.GroupNorm, 'IN': nn.InstanceNorm2d, 'SN': SN2d,
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
    cfg = dict(type=cfg) if isinstance(cfg, str) else dict(cfg)
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
    if 'affine' in cfg:
        raise ValueError('BNET: norm has no affine of its own, got affine; the depthwise transform takes its place')
    cfg['num_channels' if kind == 'GN' else 'num_features'] = num_features
    if kind != 'SyncBN':
        cfg['affine'] = False
    try:
        return NORMALIZERS[kind](**cfg)
    except TypeError as error:
        raise ValueError(f'BNET: norm={kind!r}: {error}') from error


def is_foreign_sync_batch_norm(module: nn.Module | None) -> bool:
    """Whether this is torch's or mmcv's SyncBatchNorm (mmcv's is found by name: mmcv need not be installed)."""
    return type(module).__name__ == 'SyncBatchNorm' and not isinstance(module, SyncBatchNorm)


def can_be_normalizer(norm: nn.Module) -> bool:
    """Whether BNET can hold this norm: one of the kinds above, and no subclass that does more in its forward."""
    if is_foreign_sync_batch_norm(norm):
        return True
    kinds = [kind for kind in (BatchNorm, *NORMALIZERS.values()) if isinstance(norm, kind)]
    other_dims = isinstance(norm, (nn.BatchNorm1d, nn.BatchNorm3d))
    return not other_dims and any(type(norm).forward is kind.forward for kind in kinds)


def without_affine(norm: nn.Module) -> nn.Module:
    """A copy of ``norm`` that only normalises, with its statistics and mode; SyncBatchNorm becomes ours.

    Raises:
        ValueError: If this is no norm that BNET can hold.
    """
    if not can_be_normalizer(norm):
        raise ValueError(
            f'BNET: norm must be one of {", ".join(kind.__name__ for kind in NORMALIZERS.values())}, and not a '
            f'subclass with a forward of its own, got {type(norm).__name__}'
        )
    if is_foreign_sync_batch_norm(norm):
        return SyncBatchNorm.from_host(norm)
    twin = copy.deepcopy(norm)
    twin.weight = twin.bias = None
    twin.affine = False
    if isinstance(norm, CBN):
        twin.follow_same(norm)
    return twin


def with_affine(normalizer: nn.Module, weight: Tensor, bias: Tensor) -> nn.Module:
    """A copy of ``normalizer`` with this weight (C,) and bias (C,); our SyncBatchNorm becomes torch's."""
    twin = copy.deepcopy(normalizer)
    if isinstance(normalizer, SyncBatchNorm):
        options = (normalizer.eps, normalizer.momentum, True, normalizer.track_running_stats, normalizer.process_group)
        twin = nn.SyncBatchNorm(normalizer.num_features, *options).train(normalizer.training)
        for name, value in normalizer.named_buffers():
            setattr(twin, name, value.clone())
    if isinstance(normalizer, CBN):
        twin.follow_same(normalizer)
    twin.affine = True
    twin.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
    twin.bias = nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
    return twin
