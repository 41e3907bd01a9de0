"""The operation in plain torch against sums over shifted copies."""

import pytest
import torch

from bnet_mm.ops.reference import bnet_reference, moments_reference
from helpers import reference

DOUBLE = {'dtype': torch.float64}


@pytest.mark.parametrize('relu', [False, True])
@pytest.mark.parametrize('per_sample', [False, True])
@pytest.mark.parametrize('k, dilation', [(1, 1), (3, 2), (9, 1), (5, 3)])
def test_equals_the_formula(k, dilation, per_sample, relu):
    """Sizes and dilations that no kernel takes, too."""
    numbers = (3, 4) if per_sample else (4,)
    x, residual = torch.randn(2, 3, 4, 7, 6, **DOUBLE)
    mean, rstd = torch.randn(numbers, **DOUBLE), torch.rand(numbers, **DOUBLE) + 0.5
    weight, bias = torch.randn(4, 1, k, k, **DOUBLE), torch.randn(4, **DOUBLE)
    x_hat = (x - mean.view(-1, 4, 1, 1)) * rstd.view(-1, 4, 1, 1)
    want = reference.depthwise(x_hat, weight, bias, dilation) + residual
    got = bnet_reference(x, mean, rstd, weight, bias, residual, relu, dilation)
    torch.testing.assert_close(got, want.clamp(min=0) if relu else want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32])
def test_is_rounded_once(dtype):
    x = (torch.randn(2, 4, 7, 6) * 2 + 1).to(dtype)
    mean, rstd, weight, bias = torch.randn(4), torch.rand(4) + 0.5, torch.randn(4, 1, 3, 3), torch.randn(4)
    got = bnet_reference(x, mean, rstd, weight, bias)
    x_hat = (x.double() - mean.view(4, 1, 1)) * rstd.view(4, 1, 1)
    want = reference.depthwise(x_hat, weight.double(), bias.double())
    assert got.dtype == dtype
    error = (got.double() - want).abs()
    assert (error <= 0.51 * torch.finfo(dtype).eps * want.abs() + 64 * torch.finfo(torch.float32).eps).all()


@pytest.mark.parametrize('over_batch', [True, False])
def test_moments(over_batch):
    x = torch.randn(3, 4, 5, 6, **DOUBLE) * 2 + 1
    mean, var = moments_reference(x, over_batch)
    if over_batch:
        want = reference.batch_statistics(x)
    else:
        want = [torch.stack(part) for part in zip(*(reference.batch_statistics(one[None]) for one in x))]
    torch.testing.assert_close([mean, var], list(want))
    assert moments_reference(x.half(), over_batch)[0].dtype == torch.float32
