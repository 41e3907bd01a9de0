"""Which kernels run: a table of backends, and the choice among them.

``BNET_MM_BACKEND`` is ``auto`` (the default), or the name of a backend; one that is named and cannot run raises.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from bnet_mm.ops import flops, schemas  # noqa: F401  (declare torch.ops.bnet_mm)
from bnet_mm.ops.limits import CPP_DTYPES, KERNEL_SIZES, TRITON_DTYPES

is_exporting = getattr(torch.compiler, 'is_exporting', lambda: False)  # since torch 2.7
# torch has no public questions for these
_functorch_active = getattr(torch._C, '_are_functorch_transforms_active', lambda: False)
_is_legacy_batched = getattr(getattr(torch._C, '_functorch', None), 'is_legacy_batchedtensor', lambda tensor: False)
VARIABLE = 'BNET_MM_BACKEND'


class BackendError(RuntimeError):
    """A backend that was asked for cannot run."""


class Backend(NamedTuple):
    """An implementation of ``torch.ops.bnet_mm.*``.

    device: The type of device whose tensors it takes.
    dtypes: The dtypes of maps that it takes.
    load: Registers the operators and returns a word on them; an ImportError or OSError says what is missing.
    check: Called before the first use of a dtype and k; an ImportError says that their results are wrong here.
    """

    device: str
    dtypes: tuple[torch.dtype, ...]
    load: Callable[[], str]
    check: Callable[[torch.dtype, int], None] | None = None


def _load_cpp() -> str:
    from bnet_mm.ops import cpp

    return cpp.load()


def _load_triton() -> str:
    if not (torch.cuda.is_available() or INTERPRETED):
        raise ImportError('torch finds no CUDA device')
    from bnet_mm.ops import triton

    return triton.load()


def _check_triton(dtype: torch.dtype, k: int) -> None:
    from bnet_mm.ops import triton

    triton.check(dtype, k)


INTERPRETED = os.environ.get('TRITON_INTERPRET') == '1'  # Triton's kernels in Python, on a CPU, for tests
BACKENDS = {
    'cpp': Backend('cpu', CPP_DTYPES, _load_cpp),
    'triton': Backend('cpu' if INTERPRETED else 'cuda', TRITON_DTYPES, _load_triton, _check_triton),
}


@functools.cache
def load_backend(name: str) -> tuple[bool, str]:
    """Whether a backend can run here, and a word on it, or why not."""
    try:
        return True, BACKENDS[name].load()
    except (ImportError, OSError) as error:
        return False, str(error)


def refusal(name: str, device: str, dtype: torch.dtype, k: int, dilation: int) -> str | None:
    """Why this backend cannot take such a call; None if it can."""
    backend = BACKENDS[name]
    if device != backend.device:
        return f'it is for {backend.device} tensors, the input is on {device}'
    if dtype not in backend.dtypes:
        return f'it takes {", ".join(str(d) for d in backend.dtypes)}, the input is {dtype}'
    if k not in KERNEL_SIZES or dilation != 1:
        return f'it takes k = {", ".join(map(str, KERNEL_SIZES))} without dilation, not k={k}, dilation={dilation}'
    available, text = load_backend(name)
    if not available:
        return text
    try:
        if backend.check:
            backend.check(dtype, k)
    except (ImportError, OSError) as error:
        return str(error)
    return None


@torch.compiler.assume_constant_result  # torch.compile calls it, and does not trace into it
def choose(choice: str, device: str, dtype: torch.dtype, k: int, dilation: int) -> str:
    """The name of the backend for such a call, 'reference' if no compiled one fits; the same for ever.

    Raises:
        ValueError: For an unknown choice.
        BackendError: If the choice is a backend that cannot run this.
    """
    return _choose(choice, device, dtype, k, dilation)


@functools.cache
def _choose(choice: str, device: str, dtype: torch.dtype, k: int, dilation: int) -> str:
    if choice not in ('auto', 'reference', *BACKENDS):
        raise ValueError(f'{VARIABLE} must be auto, reference, {" or ".join(BACKENDS)}, got {choice!r}')
    if choice in BACKENDS:
        reason = refusal(choice, device, dtype, k, dilation)
        if reason:
            raise BackendError(f'{VARIABLE}={choice}, but this backend cannot run here: {reason}')
        return choice
    for name in BACKENDS if choice == 'auto' else ():
        if refusal(name, device, dtype, k, dilation) is None:
            return name
    return 'reference'


def transforms_active(*tensors: Tensor) -> bool:
    """Whether torch.func, vmap or forward-mode differentiation is at work, for which the kernels have no rules."""
    if torch.compiler.is_compiling():
        return _functorch_active()
    return _functorch_active() or forward_ad._current_level >= 0 or any(map(_is_legacy_batched, tensors))


def select_backend(x: Tensor, k: int, dilation: int = 1) -> str:
    """The name of the backend that runs :func:`bnet_mm.ops.bnet` on x: 'cpp', 'triton' or 'reference'.

    Raises:
        ValueError, BackendError: As :func:`choose`.
    """
    if torch.jit.is_tracing() or is_exporting() or x.numel() == 0 or transforms_active(x):
        return 'reference'  # nothing to do, or torch's own operators, which graphs can hold and torch.func transforms
    return choose(os.environ.get(VARIABLE, 'auto'), x.device.type, x.dtype, k, dilation)


def convolution_dtype(x: Tensor) -> torch.dtype:
    """The dtype of torch's convolutions of x: autocast's, where that is on."""
    device, dtype = x.device.type, None
    if hasattr(torch, 'get_autocast_dtype'):  # since torch 2.4
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    elif device == 'cpu':
        dtype = torch.get_autocast_cpu_dtype() if torch.is_autocast_cpu_enabled() else None
    elif torch.is_autocast_enabled():
        dtype = torch.get_autocast_gpu_dtype()
    return x.dtype if dtype is None or x.dtype == torch.float64 else dtype


def describe_backend(x: Tensor, k: int, dilation: int = 1) -> str:
    """The backend for maps of x's device and dtype, for a repr: never raises."""
    try:
        return choose(os.environ.get(VARIABLE, 'auto'), x.device.type, x.dtype, k, dilation)
    except (ValueError, BackendError):
        return f'none ({VARIABLE}={os.environ[VARIABLE]} cannot run here)'


def forget() -> None:
    """Make the next calls load and choose anew."""
    load_backend.cache_clear()
    _choose.cache_clear()


def backend_report() -> dict[str, str]:
    """What each backend can do here: name -> 'available ...' or the reason why not."""
    report = {'reference': 'available: plain torch, everywhere'}
    for name, backend in BACKENDS.items():
        available, text = load_backend(name)
        takes = f'{backend.device}, {", ".join(str(dtype).removeprefix("torch.") for dtype in backend.dtypes)}'
        report[name] = f'available: {takes}; {text}' if available else f'not available: {text}'
    return report
