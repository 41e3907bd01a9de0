"""limits.py and the compiled CPU operators agree."""

import pytest
import torch

from bnet_mm.ops import dispatch
from bnet_mm.ops.limits import CPP_DTYPES, KERNEL_SIZES, TRITON_DTYPES
from helpers.kernels import NAMES, compiled, formula, make_inputs

ALL_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int32, torch.complex64)


def forward(k, dtype, wide=None):
    """The operator and float64 on the same numbers; ``wide`` is the dtype of what goes with the channels."""
    values = make_inputs((2, 5, 6, 7), k, dtype)
    exact = formula(*(None if values[name] is None else values[name].double() for name in NAMES), relu=False)
    numbers = (values[name].to(wide or values[name].dtype) for name in ('mean', 'rstd', 'weight', 'bias'))
    return torch.ops.bnet_mm.forward(values['x'], *numbers, None, False), exact


@compiled
@pytest.mark.parametrize('dtype', CPP_DTYPES, ids=str)
@pytest.mark.parametrize('k', KERNEL_SIZES)
def test_what_the_limits_allow_runs(k, dtype):
    got, want = forward(k, dtype)
    assert got.dtype == dtype and dispatch.refusal('cpp', 'cpu', dtype, k, 1) is None
    tolerance = 4 * torch.finfo(dtype).eps * want.abs().max().item()
    torch.testing.assert_close(got.double(), want, rtol=0, atol=tolerance)


@compiled
@pytest.mark.parametrize('k', [k for k in range(12) if k not in KERNEL_SIZES])
def test_other_kernel_sizes_are_refused(k):
    with pytest.raises(ValueError, match='weight must be .* with k 1, 3, 5 or 7'):
        torch.ops.bnet_mm.forward(torch.ones(1, 2, 3, 4), *torch.ones(2, 2), torch.ones(2, 1, k, k), torch.ones(2),
                                  None, False)  # fmt: skip
    assert 'k = 1, 3, 5, 7' in dispatch.refusal('cpp', 'cpu', torch.float32, k, 1)


@compiled
@pytest.mark.parametrize('dtype', [dtype for dtype in ALL_DTYPES if dtype not in CPP_DTYPES], ids=str)
def test_other_dtypes_are_refused(dtype):
    x, numbers = torch.ones(1, 2, 3, 4).to(dtype), torch.ones(2, 2)
    with pytest.raises(TypeError, match='x must be'):
        torch.ops.bnet_mm.forward(x, *numbers, torch.ones(2, 1, 3, 3), torch.ones(2), None, False)
    with pytest.raises(TypeError, match='x must be'):
        torch.ops.bnet_mm.moments(x, True)
    assert f'the input is {dtype}' in dispatch.refusal('cpp', 'cpu', dtype, 3, 1)


def test_the_table_of_backends_has_these_limits():
    assert dispatch.BACKENDS['cpp'].dtypes == CPP_DTYPES and dispatch.BACKENDS['triton'].dtypes == TRITON_DTYPES
