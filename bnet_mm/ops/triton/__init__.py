"""The operators of schemas.py for CUDA, in Triton: kernels/, plans.py (how they are cut), launch.py, launchers.py.

The import needs Triton. Under TRITON_INTERPRET=1, set before Triton's first import, it all runs on CPU tensors.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable

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

from triton.runtime.cache import get_cache_manager  # noqa: E402

from bnet_mm.ops.reference import bnet_reference  # noqa: E402
from bnet_mm.ops.schemas import LIBRARY  # noqa: E402
from bnet_mm.ops.triton import kernels, launchers  # noqa: E402

CHECK = 'BNET_MM_CHECK'
CHECKED = 'checked'
EPS = 1e-5
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
    if _capturing():
        return

    def forward() -> bool:
        x = torch.arange(240, dtype=torch.float32, device='cpu').sin().view(2, 3, 5, 8)
        numbers = (x[0, :, 0, 0], x[1, :, 1, 1], x[0, :, None, :3, :3], x[1, :, 2, 2])
        inputs = [tensor.to(device) for tensor in (x, *numbers)]
        y = launchers.forward(*inputs, None, False).cpu()  # type: ignore[call-arg, arg-type]
        return torch.allclose(y, bnet_reference(x, *numbers), rtol=1e-4, atol=1e-4)

    _run(forward, f"Triton's kernels cannot run on {device}")


def check(dtype: torch.dtype, k: int, device: str = 'cuda') -> None:
    """Compare a norm's forward and backward pass in both layouts with torch's operators in float64, on small maps.

    Once per machine and kind of GPU: Triton's cache remembers what has agreed. Compiling takes some seconds, and
    ``BNET_MM_CHECK=0`` leaves all this out.

    Raises:
        ImportError: If they do not agree; with a warning.
    """
    if os.environ.get(CHECK, '1') == '0' or os.environ.get('TRITON_INTERPRET') == '1' or _capturing():
        return
    gpu = torch.cuda.get_device_name() if device == 'cuda' else device
    sources = ' '.join(value.cache_key for value in vars(kernels).values() if isinstance(value, triton.JITFunction))
    remembered = get_cache_manager(f'bnet_mm check {triton.__version__} {gpu} {dtype} {k} {sources}')
    if remembered.has_file(CHECKED):
        return
    _run(lambda: _agrees(dtype, k, device), f"Triton's kernels of {dtype} and k={k} cannot run on {gpu}")
    remembered.put('', CHECKED)


def _capturing() -> bool:
    """Whether a graph is recorded: waits for results would end that."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _agrees(dtype: torch.dtype, k: int, device: str) -> bool:
    shape = (2, 8, 6, 12)
    numbers = torch.arange(3456, dtype=torch.float32, device='cpu')
    x, grad, weight = numbers.sin().split(1152)
    x, grad, weight = x.view(shape).to(dtype), grad.view(shape).to(dtype), weight[: 8 * k * k].view(8, 1, k, k)
    bias = weight[:, 0, 0, 0].clone()
    wide, taps, shift = (tensor.double().requires_grad_() for tensor in (x, weight, bias))
    with torch.enable_grad():
        var, mean = torch.var_mean(wide, (0, 2, 3), correction=0)
        y = bnet_reference(wide, mean, (var + EPS).rsqrt(), taps, shift)
        expected = (y, *torch.autograd.grad(y, (wide, taps, shift), grad.double()))
    rounding = max(1e-4, 2 * torch.finfo(dtype).eps)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        a, g = (tensor.to(device).contiguous(memory_format=memory_format) for tensor in (x, grad))
        w, b = weight.to(device), bias.to(device)
        y, mean, rstd = launchers.norm(a, None, w, b, None, None, True, 0.1, EPS, False)
        grad_x, grad_weight, grad_bias, _ = launchers.norm_backward(g, a, mean, rstd, w, None, True, True, False)
        for ours, theirs in zip((y, grad_x, grad_weight, grad_bias), expected):
            largest = theirs.abs().max().item()
            if not torch.allclose(ours.cpu().double(), theirs, rtol=rounding, atol=rounding * largest):
                return False
    return True


def _run(agree: Callable[[], bool], problem: str) -> None:
    """Raise ImportError, after a warning, unless agree() returns True."""
    with _disable_current_modes(), torch.no_grad():  # such as that of fake tensors, under torch.compile
        try:
            reason = None if agree() else 'their results are wrong'
        except Exception as error:  # of whatever kind: nobody's model shall stop here
            reason = f'{type(error).__name__}: {error}'
    if reason is None:
        return
    warnings.warn(f"{problem}: {reason}; torch's operators run instead", RuntimeWarning, stacklevel=3)
    raise ImportError(f'{problem}: {reason}')
