"""The operators of schemas.py for CUDA, in Triton: kernels/, plans.py (how they are cut), launch.py, launchers.py.

The import needs Triton. Under TRITON_INTERPRET=1, set before Triton's first import, it all runs on CPU tensors.
"""

from __future__ import annotations

import functools
import os
import warnings

import torch
from torch.utils._python_dispatch import _disable_current_modes

try:
    import triton
except ImportError as error:
    raise ImportError(
        'Triton is not installed (it comes with CUDA builds of torch; else pip install triton)'
    ) from error
if tuple(int(part) for part in triton.__version__.split('.')[:2]) < (3, 3):
    raise ImportError(f'Triton must be 3.3 or newer (torch 2.7), got {triton.__version__}')

from bnet_mm.ops.reference import bnet_reference  # noqa: E402
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
        ImportError: If there is no CUDA device, or if a kernel cannot be compiled and launched, which warns as well.
    """
    interpreted = os.environ.get('TRITON_INTERPRET') == '1'
    if not interpreted:
        if not torch.cuda.is_available():
            raise ImportError('torch finds no CUDA device')
        try_kernel('cuda')
    for function in OPERATORS:
        LIBRARY.impl(function.__name__, function, 'CPU' if interpreted else 'CUDA')
    return f'Triton {triton.__version__}{" in its interpreter" if interpreted else ""}'


def try_kernel(device: str) -> None:
    """Compile a kernel and run it on a small map: a C compiler, a folder for Triton's cache and a driver must be there.

    Raises:
        ImportError: If that fails, or gives other values than torch's operators; with a warning.
    """
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return  # waits for the results would end the capture
    with _disable_current_modes(), torch.no_grad():  # such as that of fake tensors, under torch.compile
        x = torch.arange(240, dtype=torch.float32, device='cpu').sin().view(2, 3, 5, 8)
        numbers = (x[0, :, 0, 0], x[1, :, 1, 1], x[0, :, None, :3, :3], x[1, :, 2, 2])
        try:
            inputs = [tensor.to(device) for tensor in (x, *numbers)]
            y = launchers.forward(*inputs, None, False).cpu()  # type: ignore[call-arg, arg-type]
        except Exception as error:  # of whatever kind: nobody's model shall stop here
            reason = f'{type(error).__name__}: {error}'
        else:
            if torch.allclose(y, bnet_reference(x, *numbers), rtol=1e-4, atol=1e-4):
                return
            reason = 'their results are wrong'
    message = f"Triton's kernels cannot run on {device}: {reason}"
    warnings.warn(f"{message}; torch's operators run instead", RuntimeWarning, stacklevel=2)
    raise ImportError(message)
