"""What the compiled kernels take. csrc/checks.h says the same in C++; a test compares them."""

from __future__ import annotations

import torch

KERNEL_SIZES = (1, 3, 5, 7)
CPP_DTYPES = (torch.float32, torch.bfloat16, torch.float64)
TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
