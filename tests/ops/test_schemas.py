"""On meta tensors the operators have the shapes, dtypes and strides of the compiled ones."""

import pytest
import torch

from bnet_mm.ops.schemas import like_map, wide_dtype
from helpers.kernels import DTYPES, NAMES, compiled, make_inputs


def facts(outputs):
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else outputs or []
    return [(tuple(y.shape), y.dtype, y.stride()) for y in outputs]


@compiled
@pytest.mark.parametrize('channels_last', [False, True])
@pytest.mark.parametrize('per_sample', [False, True])
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float64'])
def test_meta_is_as_the_kernels(dtype, per_sample, channels_last):
    values = make_inputs((2, 3, 5, 4), 3, DTYPES[dtype], per_sample, channels_last, residual=True)
    x, mean, rstd, weight, bias, residual = (values[name] for name in NAMES)
    calls = {
        'forward': (x, mean, rstd, weight, bias, residual, True),
        'backward': (x, x, mean, rstd, weight, True, True),
        'moments': (x, not per_sample),
        'moments_backward': (x.clone(), x, mean, mean, mean),
    }
    for name, arguments in calls.items():
        operator = getattr(torch.ops.bnet_mm, name)
        on_meta = [value.to('meta') if isinstance(value, torch.Tensor) else value for value in arguments]
        assert facts(operator(*on_meta)) == facts(operator(*arguments)), name


@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('dtype', DTYPES)
def test_shapes_of_the_whole_norm(dtype, layout):
    x = torch.empty(2, 3, 5, 4, dtype=DTYPES[dtype], device='meta').to(memory_format=layout)
    weight = torch.empty(3, 1, 5, 5, dtype=wide_dtype(x.dtype), device='meta')
    numbers = [((3,), weight.dtype, (1,))]
    running = [torch.empty(3, dtype=weight.dtype, device='meta')] * 2
    outputs = torch.ops.bnet_mm.norm(x, x, weight, weight[:, 0, 0, 0], *running, True, 0.1, 1e-5, True)
    assert facts(outputs) == facts(x) + numbers * 2
    for residual in (False, True):
        grads = torch.ops.bnet_mm.norm_backward(x, x, *running, weight, x, True, True, residual)
        assert (grads[3] is not None) == residual
        assert facts(filter(torch.is_tensor, grads)) == facts(x) + facts(weight) + numbers + facts(x) * residual


def test_meta_names_what_is_on_another_device():
    x, numbers = torch.ones(1, 2, 3, 4, device='meta'), torch.ones(2, device='meta')
    with pytest.raises(ValueError, match='bias must be on meta as x, got cpu'):
        torch.ops.bnet_mm.forward(x, numbers, numbers, torch.ones(2, 1, 1, 1, device='meta'), torch.ones(2), None, True)


@pytest.mark.parametrize('dtype, wide', [
    (torch.float16, torch.float32), (torch.bfloat16, torch.float32), (torch.float32, torch.float32),
    (torch.float64, torch.float64),
])  # fmt: skip
def test_wide_dtype(dtype, wide):
    assert wide_dtype(dtype) == wide


def test_like_map():
    x = torch.empty(2, 3, 4, 5)
    last = x.contiguous(memory_format=torch.channels_last)
    assert like_map(x).stride() == like_map(x.transpose(2, 3).contiguous().transpose(2, 3)).stride() == x.stride()
    assert like_map(last).stride() == last.stride()
