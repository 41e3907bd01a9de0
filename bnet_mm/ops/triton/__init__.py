"""The operators of schemas.py for CUDA, in Triton: kernels.py, plans.py (how they are cut), launchers.py, :func:`load`.

The import needs Triton. Under TRITON_INTERPRET=1, set before Triton's first import, it all runs on CPU tensors.
"""

from __future__ import annotations

import functools
import os

import torch

try:
    import triton
except ImportError as error:
    raise ImportError(
        'Triton is not installed (it comes with CUDA builds of torch; else pip install triton)'
    ) from error
if tuple(int(part) for part in triton.__version__.split('.')[:2]) < (3, 3):
    raise ImportError(f'Triton must be 3.3 or newer (torch 2.7), got {triton.__version__}')

from bnet_mm.ops.schemas import LIBRARY  # noqa: E402
from bnet_mm.ops.triton import launchers  # noqa: E402

OPERATORS = (
    launchers.forward,
    launchers.backward,
    launchers.moments,
    launchers.moments_backward,
    launchers.moments_backward_rounded,
    launchers.norm,
    launchers.norm_backward,
)


@functools.cache
def load() -> str:
    """Register the operators for CUDA, in Triton's interpreter for the CPU; returns what runs them.

    Raises:
        ImportError: If there is no CUDA device.
    """
    interpreted = os.environ.get('TRITON_INTERPRET') == '1'
    if not interpreted and not torch.cuda.is_available():
        raise ImportError('torch finds no CUDA device')
    for function in OPERATORS:
        LIBRARY.impl(function.__name__, function, 'CPU' if interpreted else 'CUDA')
    return f'Triton {triton.__version__}{" in its interpreter" if interpreted else ""}'
