"""How a BNET layer is written in checkpoints, and how every other layout is read into ours.

Ours, for a layer called ``bn3``::

    bn3.bnconv.weight (C, 1, k, k)    bn3.bnconv.bias (C,)
    bn3.norm.running_mean (C,)        bn3.norm.running_var (C,)        bn3.norm.num_batches_tracked ()

Also accepted, by ``load_state_dict`` itself and so everywhere a checkpoint is loaded:

- BN, or whatever norm the layer has inside: ``bn3.weight`` (C,) goes to the centre tap and ``bn3.bias`` to the bias,
  the rest below ``bn3.norm``, so the function is unchanged;
- the official ImageNet and detection layout: ``bnet3.bnconv.*`` with ``bnet3.running_*``;
- the older official detection layout: ``bnconv3.*`` beside ``bn3.running_*``;
- a smaller k, which is centred in the larger kernel (the dilation is the layer's: checkpoints do not hold it).

The official names sit beside the layer rather than below it, so the module that holds the layer renames them
(layers/holders.py); the rest is the layer's own business (:func:`adapt_bnet_keys`).
"""

from __future__ import annotations

import re
from collections.abc import MutableMapping
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from bnet_mm.layers.bnet import BNET

StateDict = MutableMapping[str, Tensor]

STATISTICS = ('running_mean', 'running_var', 'num_batches_tracked')
OPTIONAL = ('num_batches_tracked', '_extra_state')  # what a layer does without: a counter, the history of CBN
# <block>.bnet3.<rest> and <block>.bnconv3.{weight,bias}, the two official spellings of our <block>.bn3.<...>
OFFICIAL_LAYER = re.compile(r'(?P<block>(?:.*\.)?)bnet(?P<index>\d*)\.(?P<rest>.+)')
OFFICIAL_OLD_TRANSFORM = re.compile(r'(?P<block>(?:.*\.)?)bnconv(?P<index>\d+)\.(?P<rest>weight|bias)')


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be loaded without losing something."""


def parse_key(key: str) -> tuple[str, str, bool]:
    """The layer as hosts call it, its tensor as we call it, and whether the layer has an official name in ``key``::

    a.bnet3.running_var -> a.bn3, norm.running_var, True        a.bn3.running_var  -> a.bn3, norm.running_var, False
    a.bnconv3.weight    -> a.bn3, bnconv.weight, True           a.bn3.bnconv.weight -> a.bn3, bnconv.weight, False
    """
    if match := OFFICIAL_OLD_TRANSFORM.fullmatch(key):
        return '{block}bn{index}'.format(**match.groupdict()), f'bnconv.{match["rest"]}', True
    match = OFFICIAL_LAYER.fullmatch(key)
    if match:
        layer, tensor = '{block}bn{index}'.format(**match.groupdict()), match['rest']
    else:
        layer, _, tensor = key.rpartition('.')
    for part in ('bnconv', 'norm'):
        if layer.endswith(f'.{part}') or layer == part:
            layer, tensor = layer[: -len(part) - 1], f'{part}.{tensor}'
    return layer, f'norm.{tensor}' if tensor in STATISTICS else tensor, bool(match)


def to_our_key(key: str) -> str:
    """An official key as ours, ``bnet3.running_var`` as ``bn3.norm.running_var``; any other key as it is."""
    layer, tensor, official = parse_key(key)
    return f'{layer}.{tensor}' if official else key


def move_key(state_dict: StateDict, key: str, new_key: str, own: Tensor | None = None) -> None:
    """Rename a key.

    Args:
        own: What the module that is loaded has under the new name now. FSDP2 adds a module's own tensors for all keys
            that a full state dict lacks; such an entry gives way.

    Raises:
        CheckpointError: If the new name is taken.
    """
    if new_key in state_dict and not (own is not None and _same_memory(state_dict[new_key], own)):
        raise CheckpointError(f'the checkpoint holds {new_key} twice: also as {key}')
    state_dict[new_key] = _sharded_as(own, state_dict.pop(key))


def _same_memory(one: Tensor, other: Tensor) -> bool:
    one, other = (getattr(tensor, '_local_tensor', tensor) for tensor in (one, other))  # of a DTensor
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr() != 0


def _sharded_as(own: Any, value: Tensor) -> Tensor:
    """``value`` on the devices of ``own``, if that is a sharded parameter and ``value`` is whole."""
    if not hasattr(own, 'placements') or hasattr(value, 'placements'):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(own.device), own.device_mesh, own.placements)


def missing_keys(state_dict: StateDict, prefix: str, layer: nn.Module) -> list[str]:
    """What a BNET ``layer`` called ``prefix`` (with the final dot) needs and would not find, in our layout or BN's."""
    needed = [name for name in layer.state_dict() if not name.endswith(OPTIONAL)]
    return [prefix + name for name in needed if not any(prefix + key in state_dict for key in _spellings(name))]


def _spellings(name: str) -> set[str]:
    """The names, ours or the norm's own, under which a layer takes its tensor ``name``: norm.bn.running_mean also as
    norm.running_mean, bn.running_mean and running_mean.
    """
    last = name.rpartition('.')[2]
    return {name, name.removeprefix('norm.'), f'norm.{last}', last}


def adapt_bnet_keys(state_dict: StateDict, prefix: str, layer: BNET) -> None:
    """Rewrite, in place, the keys below ``prefix`` into the layout of the BNET ``layer``.

    Raises:
        CheckpointError: If the kernel in the checkpoint does not fit the layer, or something is no tensor.
    """
    own = layer.state_dict()
    for key in [key for key in state_dict if key.startswith(prefix)]:
        name = key[len(prefix) :]
        if not isinstance(state_dict[key], Tensor) and not name.endswith('_extra_state'):
            raise CheckpointError(f'{key} is a {type(state_dict[key]).__name__} in the checkpoint, not a tensor')
        if not name.startswith(('norm.', 'bnconv.')) and name not in ('weight', 'bias'):
            move_key(state_dict, key, f'{prefix}norm.{name}', own.get(f'norm.{name}'))
    taps = prefix + 'bnconv.weight'
    if taps in state_dict:
        state_dict[taps] = _enlarge_kernel(state_dict[taps], tuple(layer.bnconv.weight.shape), taps)
    if prefix + 'weight' in state_dict:
        kernel = _as_kernel(state_dict[prefix + 'weight'], prefix)
        state_dict[prefix + 'weight'] = _enlarge_kernel(kernel, tuple(layer.bnconv.weight.shape), taps)
        move_key(state_dict, prefix + 'weight', taps, own.get('bnconv.weight'))
        if prefix + 'bias' in state_dict:
            state_dict[prefix + 'bias'] = state_dict[prefix + 'bias'].flatten()
            move_key(state_dict, prefix + 'bias', prefix + 'bnconv.bias', own.get('bnconv.bias'))


def _as_kernel(gamma: Tensor, prefix: str) -> Tensor:
    """A norm's weight, (C,) or official SN's (1, C, 1, 1), as a 1 x 1 depthwise kernel (C, 1, 1, 1)."""
    if gamma.numel() != max(gamma.shape, default=0):
        raise CheckpointError(f'{prefix}weight must be the (C,) weight of a norm, got shape {tuple(gamma.shape)}')
    return gamma.reshape(-1, 1, 1, 1)


def _enlarge_kernel(kernel: Tensor, shape: tuple[int, ...], key: str) -> Tensor:
    """Centre a (C, 1, j, j) kernel in zeros of ``shape`` (C, 1, k, k), j <= k; the function stays the same."""
    margin = shape[-1] - kernel.shape[-1] if kernel.dim() == 4 else -1
    if margin < 0 or margin % 2 or kernel.shape[-1] != kernel.shape[-2] or tuple(kernel.shape[:2]) != shape[:2]:
        raise CheckpointError(
            f'{key} has shape {tuple(kernel.shape)} in the checkpoint; the layer takes {shape} or a smaller odd kernel'
        )
    return F.pad(kernel, [margin // 2] * 4) if margin else kernel
