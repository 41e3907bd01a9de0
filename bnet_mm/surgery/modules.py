"""What a module is, and other modules in its place."""

from __future__ import annotations

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from bnet_mm.layers.normalisers import can_be_normaliser, has_hooks


def is_norm(module: nn.Module) -> bool:
    """Whether a person would call this module a norm."""
    known = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.LocalResponseNorm)
    return isinstance(module, known) or can_be_normaliser(module)


def is_changed(module: nn.Module) -> bool:
    """Whether the module, or a part of it, does more in its forward than its class says."""
    return any(has_hooks(part) or is_parametrized(part) for part in module.modules())


def replace_modules(model: nn.Module, replaced: dict[nn.Module, nn.Module]) -> None:
    """Put other modules in the place of some, wherever in ``model`` they stand."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):  # named_children() hides the second name of a shared one
            if child in replaced:
                setattr(parent, name, replaced[child])
