"""The loader of the compiled CPU extension (csrc/), which setup.py builds where there are a compiler and torch."""

from __future__ import annotations

from importlib.util import find_spec

import torch


def load() -> str:
    """Register the operators of the extension; returns the instruction set that they use here.

    Raises:
        ImportError: If it was not built.
        OSError: If it was built for another torch, or cannot be loaded for another reason.
    """
    spec = find_spec('bnet_mm._cpu')
    if spec is None:
        raise ImportError('the C++ extension was not built (pip install --no-build-isolation, with a C++ compiler)')
    try:
        torch.ops.load_library(spec.origin)
    except OSError as error:
        raise OSError(f'{error} {error.__cause__ or ""}'.strip()) from error
    return torch.ops.bnet_mm.cpu_instruction_set()
