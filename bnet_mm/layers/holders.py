"""What our layers need from the module that holds them.

- BNET: the official names of a layer sit beside it, not below it, and whether a layer that finds no weights is a loss
  depends on the convolution before it. Both are seen by the holder only, which therefore gets a pre-hook for loading.
- CBN compensates for the changes of the convolution before it, and FReLU has the channels of the one before it.

torch tells us of every module that is put into another one, through its module registration hook (host/__init__.py).
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from bnet_mm.checkpoint.layouts import CheckpointError, StateDict, missing_keys, move_key, to_our_key
from bnet_mm.layers.arguments import is_lazy
from bnet_mm.layers.bnet import BNET
from bnet_mm.layers.cross_iteration_bn import CBN
from bnet_mm.layers.frelu import FReLU


def prepare_holder(holder: nn.Module, name: str, layer: nn.Module | None) -> None:
    """Tell ``holder``, or its new child ``layer``, what they need of each other; a module registration hook of torch.

    Returns:
        None, so that the child stays what it is.
    """
    if isinstance(layer, BNET) and not any(isinstance(child, BNET) for child in holder.children()):
        holder._register_load_state_dict_pre_hook(_before_loading, with_module=True)
    follower = _follower(layer)
    if follower and not isinstance(holder, BNET):
        convolution = convolution_before(holder, name)
        if convolution:
            follower.follow_registered(holder.get_submodule(convolution))
    replaced = holder._modules.get(name)
    if replaced is not None and layer is not None and layer is not replaced and is_convolution(layer):
        for child in holder.children():  # heads whose levels share convolutions replace them after they are built
            follower = _follower(child)
            if isinstance(follower, CBN) and follower.follows(replaced):
                follower.follow_registered(layer)


def _follower(layer: nn.Module | None) -> CBN | FReLU | None:
    inner = layer.norm if isinstance(layer, BNET) else layer
    return inner if isinstance(inner, (CBN, FReLU)) else None


def _before_loading(holder: nn.Module, state_dict: StateDict, prefix: str, *_) -> None:
    """Rename official names, refuse a checkpoint that has a convolution but not its norm."""
    layers = {name: child for name, child in holder.named_children() if isinstance(child, BNET)}
    for key in [key for key in state_dict if key.startswith(prefix)]:
        rest = key[len(prefix) :]
        new = to_our_key(rest)
        if new != rest and new.partition('.')[0] in layers:
            move_key(state_dict, key, prefix + new)
    for name, layer in layers.items():
        conv = convolution_before(holder, name)
        missing = missing_keys(state_dict, f'{prefix}{name}.', layer)
        if missing and conv and f'{prefix}{conv}.weight' in state_dict:
            layer_name, official = prefix + name, prefix + name.replace('bn', 'bnet', 1)
            raise CheckpointError(
                f'the checkpoint has {prefix}{conv}.weight but not the BNET layer after it, {layer_name}: no '
                f'{", ".join(missing)}. Also looked for {layer_name}.weight, {layer_name}.bias, '
                f'{layer_name}.running_mean, {layer_name}.running_var (BN) and {official}.* (official BNET). Use a '
                'checkpoint of this architecture: going on would leave this norm untrained'
            )


def convolution_before(holder: nn.Module, name: str) -> str | None:
    """Name of the last convolution that was registered in ``holder`` before its child ``name``."""
    conv = None
    for child_name, child in holder.named_children():
        if child_name == name:
            return conv
        if is_convolution(child):
            conv = child_name
    return conv


def is_convolution(module: nn.Module | None) -> bool:
    """Whether this has a weight with a row for each of its output channels, as convolutions and linear layers do."""
    if module is None or isinstance(module, (BNET, nn.Embedding)):
        return False
    # Its own: a wrapper such as FSDP's answers for what it holds, with parts of its flattened parameters.
    own = 'weight' in module._parameters or 'weight' in vars(module) or hasattr(type(module), 'weight')
    weight = module.weight if own else None
    if not isinstance(weight, Tensor):
        return False
    return isinstance(module, (_ConvNd, nn.Linear)) if is_lazy(weight) else weight.dim() >= 2
