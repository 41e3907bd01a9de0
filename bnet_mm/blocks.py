"""What our layers need from the module that holds them.

- BNET: the official names of a layer sit beside it, not below it, and whether a layer that finds no weights is a loss
  depends on the convolution before it. Both are seen by the holder only, which therefore gets a pre-hook for loading.
- CBN compensates for the changes of the convolution before it, and FReLU has the channels of the one before it.

torch tells us of every module that is put into another one, through its module registration hook.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

from bnet_mm.checkpoint.layouts import (
    CheckpointError,
    StateDict,
    adapt_bnet_keys,
    bnet_keys,
    move_key,
    official_to_host_key,
)
from bnet_mm.frelu import FReLU
from bnet_mm.norms import BNET, CBN


def watch_blocks() -> None:
    """From now on, prepare every module that one of our layers is registered in."""
    register_module_module_registration_hook(_prepare_block)


def _prepare_block(block: nn.Module, name: str, layer: nn.Module | None) -> None:
    if isinstance(layer, BNET) and not any(isinstance(child, BNET) for child in block.children()):
        block._register_load_state_dict_pre_hook(_before_loading, with_module=True)
    follower = layer.norm if isinstance(layer, BNET) else layer
    if isinstance(follower, (CBN, FReLU)) and not isinstance(block, BNET):
        convolution = convolution_before(block, name)
        if convolution:
            follower.follow_registered(block.get_submodule(convolution))


def _before_loading(block: nn.Module, state_dict: StateDict, prefix: str, *_) -> None:
    """Rename official names, adapt the layers' keys, refuse a checkpoint that has a convolution but not its norm."""
    layers = {name: child for name, child in block.named_children() if isinstance(child, BNET)}
    for key in [key for key in state_dict if key.startswith(prefix)]:
        rest = key[len(prefix) :]
        new = official_to_host_key(rest)
        if new != rest and new.partition('.')[0] in layers:
            move_key(state_dict, key, prefix + new)
    for name, layer in layers.items():
        adapt_bnet_keys(state_dict, f'{prefix}{name}.', layer)
        conv = convolution_before(block, name)
        missing = [key for key in bnet_keys(f'{prefix}{name}.', layer) if key not in state_dict]
        if missing and conv and f'{prefix}{conv}.weight' in state_dict:
            layer_name, official = prefix + name, prefix + name.replace('bn', 'bnet', 1)
            raise CheckpointError(
                f'the checkpoint has {prefix}{conv}.weight but not the BNET layer after it, {layer_name}: no '
                f'{", ".join(missing)}. Also looked for {layer_name}.weight, {layer_name}.bias, '
                f'{layer_name}.running_mean, {layer_name}.running_var (BN) and {official}.* (official BNET). Use a '
                'checkpoint of this architecture: going on would leave this norm untrained'
            )


def convolution_before(block: nn.Module, name: str) -> str | None:
    """Name of the last convolution that was registered in ``block`` before its child ``name``."""
    conv = None
    for child_name, child in block.named_children():
        if child_name == name:
            return conv
        weight = getattr(child, 'weight', None)
        if isinstance(weight, Tensor) and weight.dim() >= 2 and not isinstance(child, (BNET, nn.Embedding)):
            conv = child_name
    return conv
