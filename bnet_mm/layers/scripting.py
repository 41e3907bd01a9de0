"""What our layers say to ``torch.jit.script``, whose own messages do not tell what to do."""

from __future__ import annotations

from typing import NoReturn

from torch import nn


def refuse_scripting(layer: nn.Module) -> NoReturn:
    """As ``__prepare_scriptable__`` of a layer: torch calls it for every module that it is about to compile."""
    raise RuntimeError(
        f'{type(layer).__name__}: torch.jit.script cannot compile this layer; use torch.jit.trace or '
        'torch.export.export, or, for inference, script what bnet_mm.fold(model, conv2d=True) leaves of BNET over '
        'batch norm'
    )
