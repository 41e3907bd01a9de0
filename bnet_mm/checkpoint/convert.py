"""Explicit conversion of checkpoints: a released (official) one into our layout, a classifier into its backbone."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path

import torch

from bnet_mm.checkpoint.layouts import CheckpointError, move_key, parse_key
from bnet_mm.checkpoint.safe_load import load_checkpoint_file
from bnet_mm.files import check_target, written

LAYER_TENSORS = ('bnconv.weight', 'bnconv.bias', 'norm.running_mean', 'norm.running_var')


@dataclass
class Conversion:
    """What became of each key.

    Attributes:
        state_dict: The converted tensors.
        renamed: Old name -> new name.
        kept: Names that are the same in both layouts.
        unmatched: Problems: a BNET key that is no part of a complete layer, or a layer that lacks a tensor.
    """

    state_dict: OrderedDict
    renamed: dict[str, str] = field(default_factory=dict)
    kept: list[str] = field(default_factory=list)
    unmatched: list[str] = field(default_factory=list)


def convert_state_dict(source: dict) -> Conversion:
    """Rename the official BNET keys (ImageNet, detection, older detection) of a state dict into our layout."""
    result = Conversion(OrderedDict(source))
    # Official keys name their layer as bnet<i> or bnconv<i>; the older form keeps the statistics under bn<i>.
    layers = {layer for layer, _, official in map(parse_key, source) if official}
    for key in source:
        layer, tensor, _ = parse_key(key)
        if layer not in layers:
            result.kept.append(key)
        elif tensor not in LAYER_TENSORS and tensor != 'norm.num_batches_tracked':
            result.unmatched.append(f'{key} is no part of a BNET layer')
        elif key != f'{layer}.{tensor}':
            move_key(result.state_dict, key, f'{layer}.{tensor}')
            result.renamed[key] = f'{layer}.{tensor}'
    for layer in sorted(layers):
        missing = [name for name in LAYER_TENSORS if f'{layer}.{name}' not in result.state_dict]
        result.unmatched += [f'{layer}.{name} is missing' for name in missing]
    return result


def convert_file(source: str, target: str) -> tuple[Conversion, list[str]]:
    """Convert the checkpoint ``source`` and write ``target``, unless a key is unmatched.

    Returns:
        The conversion, and the names of the other entries of the file that are not carried over.

    Raises:
        FileNotFoundError: If ``source`` or the folder of ``target`` does not exist.
        FileExistsError: If ``target`` exists.
        CheckpointError: If ``source`` is not a checkpoint with official BNET layers.
    """
    check_target(target)
    state_dict, entries = _read(source)
    result = convert_state_dict(state_dict)
    if not result.renamed and not result.unmatched:
        raise CheckpointError(
            f'{source} has no official BNET layer (bnet<i>.* or bnconv<i>.*), so there is nothing to convert: BN '
            'checkpoints and checkpoints of bnet_mm load as they are'
        )
    left_out = [name for name in entries if name not in ('state_dict', 'meta')]
    if not result.unmatched:
        _write(target, source, entries, result.state_dict)
    return result, left_out


def write_backbone(source: str, target: str, prefix: str = 'backbone.') -> tuple[list[str], list[str]]:
    """Write the tensors of ``source`` below ``prefix``, without it: what ``init_cfg=dict(type='Pretrained')`` reads.

    Returns:
        The names of the tensors as they are written, and the names of those that are left out.

    Raises:
        FileNotFoundError, FileExistsError: As :func:`convert_file`.
        CheckpointError: If ``source`` has no such tensor.
    """
    check_target(target)
    state_dict, entries = _read(source)
    kept = {name[len(prefix) :]: value for name, value in state_dict.items() if name.startswith(prefix)}
    if not kept:
        some = ', '.join(list(state_dict)[:3])
        raise CheckpointError(f"{source} has no tensor below '{prefix}', as a classifier has; its first are {some}")
    _write(target, source, entries, OrderedDict(kept))
    return list(kept), [name for name in state_dict if not name.startswith(prefix)]


def _read(source: str) -> tuple[dict[str, torch.Tensor], dict]:
    """The state dict of a checkpoint file, and the file's entries if the state dict is one of them."""
    checkpoint = load_checkpoint_file(source, map_location='cpu')
    state_dict = checkpoint.get('state_dict', checkpoint)
    if not state_dict or not all(isinstance(value, torch.Tensor) for value in state_dict.values()):
        raise CheckpointError(f'{source} holds no state_dict of tensors')
    return state_dict, {} if state_dict is checkpoint else checkpoint


def _write(target: str, source: str, entries: dict, state_dict: OrderedDict) -> None:
    meta = {**entries.get('meta', {}), 'converted_from': Path(source).name}
    write_checkpoint(target, {'meta': meta, 'state_dict': state_dict})


def write_checkpoint(path: str, checkpoint: dict) -> None:
    """``torch.save`` that never leaves half a file."""
    with written(path) as temporary:
        torch.save(checkpoint, temporary)
