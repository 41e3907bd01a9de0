"""Launches of kernels, past Triton's JIT where they repeat an earlier one."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime import driver

ALIGNMENT = 16  # bytes, for which Triton compiles another kernel


def device_of(tensor: Tensor) -> int:
    """The index of its GPU; negative on a CPU."""
    return tensor.get_device()


def _aligned(tensors: tuple[Tensor, ...]) -> bool:
    addresses = 0
    for tensor in tensors:
        addresses |= tensor.data_ptr()
    return addresses % ALIGNMENT == 0


class Launch:
    """A kernel with all its arguments but tensors, and numbers that change nothing in what is compiled.

    The first launch on a device goes through Triton's JIT, and so does each one with a tensor that does not begin at a
    multiple of 16 bytes; of the others the compiled kernel is kept and launched directly, in a tenth of the time.

    Args:
        kernel: Its parameters are tensors, then numbers, then those of ``constants``.
        programs: Of one launch.
        lanes: Of a program, at most four warps of them.
        registers: Of a lane, at most, on NVIDIA's GPUs; None is the compiler's choice.
    """

    def __init__(self, kernel: Any, programs: int, constants: tuple, lanes: int, registers: int | None = None):
        self.kernel, self.grid, self.constants = kernel, (programs, 1, 1), constants
        self.lanes, self.registers = lanes, registers
        self._compiled: dict[int, Any] = {}  # by device

    def __call__(self, *tensors: Tensor, numbers: tuple[float, ...] = ()) -> None:
        if not isinstance(self.kernel, triton.JITFunction):  # Triton's interpreter
            self.kernel[self.grid](*tensors, *numbers, *self.constants)
            return None
        index = device_of(tensors[0])
        device = driver.active.get_current_device()
        if index >= 0 and index != device:
            with torch.cuda.device(index):
                return self(*tensors, numbers=numbers)
        compiled = self._compiled.get(device)
        if not _aligned(tensors):
            self.kernel[self.grid](*tensors, *numbers, *self.constants, **self._options())
        elif compiled is None:
            compiled = self.kernel[self.grid](*tensors, *numbers, *self.constants, **self._options())
            self._compiled[device] = compiled
        else:
            compiled[self.grid](*tensors, *numbers, *self.constants)
        return None

    def _options(self) -> dict[str, Any]:
        target = driver.active.get_current_target()
        # Sums of products are contracted, whatever this version's default is; no result depends on it (kernels).
        options: dict[str, Any] = dict(num_warps=max(1, min(4, self.lanes // target.warp_size)), enable_fp_fusion=True)
        if self.registers is not None and target.backend == 'cuda':
            options['maxnreg'] = self.registers
        return options
