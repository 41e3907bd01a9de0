"""The Triton kernels' results; without a GPU test_triton.py runs this file in Triton's interpreter."""

import itertools
import re

import pytest
import torch

from bnet_mm.ops.triton import kernels, launchers, plans
from helpers.triton_cases import (
    CUDA,
    DEVICE,
    DTYPES,
    INTERPRETED,
    LAYOUTS,
    Case,
    assert_as_good,
    check,
    check_moments,
    independent,
    needs_gpu,
    runs_kernels,
)

compiles = pytest.mark.skipif(INTERPRETED, reason='the interpreter does not compile')
WIDTHS = (1, 2, 3, 7, 31, 63, 64, 65, 127, 128, 129, 130) if CUDA else (1, 3, 31, 64, 129)  # interpreted: slow


@runs_kernels
@pytest.mark.parametrize('layout', LAYOUTS, ids=('nchw', 'channels_last'))
@pytest.mark.parametrize(
    'dtype, k', [*itertools.product(DTYPES[:1], (1, 3, 5, 7)), *zip(DTYPES[1:] * 2, (1, 3, 5, 7))], ids=str
)
def test_forward_and_backward(dtype, k, layout):
    by_sample = k in (3, 7)
    check(Case((2, 3, 9, 5), dtype, k, layout, by_sample), residual=k > 1, relu=k < 7)


@runs_kernels
@pytest.mark.parametrize('layout', LAYOUTS, ids=('nchw', 'channels_last'))
@pytest.mark.parametrize('width', WIDTHS)
def test_widths(width, layout):
    dtype = torch.float32 if width % 2 else torch.float16
    check(Case((1, 2, 3, width), dtype, 3, layout))


@runs_kernels
@pytest.mark.parametrize('layout', LAYOUTS, ids=('nchw', 'channels_last'))
@pytest.mark.parametrize('shape', [(1, 1, 1, 1), (2, 3, 1, 2), (1, 5, 2, 1), (3, 2, 3, 3)], ids=str)
def test_taps_beyond_the_map(shape, layout):
    check(Case(shape, k=7, layout=layout))
    check(Case(shape, torch.bfloat16, k=5, layout=layout, by_sample=True))


@runs_kernels
@pytest.mark.parametrize('layout', LAYOUTS, ids=('nchw', 'channels_last'))
@pytest.mark.parametrize('dtype', DTYPES, ids=str)
def test_moments(dtype, layout):
    for shape in ((2, 3, 5, 7), (1, 1, 1, 1), (3, 70, 2, 2), (2, 1, 31, 67)):
        check_moments((torch.randn(shape) * 3 + 1).to(dtype).contiguous(memory_format=layout))


@runs_kernels
@pytest.mark.parametrize('layout', LAYOUTS, ids=('nchw', 'channels_last'))
def test_moments_of_a_far_mean_and_of_outliers(layout):
    """A mean of 1000 deviations: E[x^2] - mean^2 would be off by 1e6 roundings (torch on a CPU adds in float64)."""
    x = (torch.randn(2, 3, 40, 40) + 1000).contiguous(memory_format=layout)
    check_moments(x, floor=200)
    x[:, 0, 0, 0] = 1e6
    check_moments(x, floor=200)


@runs_kernels
@pytest.mark.parametrize('layout', LAYOUTS, ids=('nchw', 'channels_last'))
@pytest.mark.parametrize('by_sample', (False, True))
def test_moments_backward(by_sample, layout):
    for dtype, shape in zip(DTYPES, ((2, 3, 5, 7), (1, 2, 1, 1), (3, 5, 20, 33))):
        case = Case(shape, dtype, layout=layout, by_sample=by_sample)
        grad_mean, grad_var = torch.randn_like(case.mean), torch.randn_like(case.mean)

        def expected(kind, case=case, grad_mean=grad_mean, grad_var=grad_var):
            count = case.x.numel() / case.mean.numel()
            numbers = (case.mean, grad_mean / count, 2 * grad_var / count)
            mean, shift, scale = (tensor.to(kind).view(-1, case.x.shape[1], 1, 1) for tensor in numbers)
            return case.grad.to(kind) + shift + scale * (case.x.to(kind) - mean)

        grad_x = case.grad.clone().to(DEVICE)
        numbers = (tensor.to(DEVICE) for tensor in (case.x, case.mean, grad_mean, grad_var))
        assert launchers.moments_backward(grad_x, *numbers) is None
        assert_as_good([grad_x.cpu()], [expected(torch.float32).to(dtype)], [expected(torch.float64)])


@runs_kernels
@pytest.mark.parametrize('layout', LAYOUTS, ids=('nchw', 'channels_last'))
@pytest.mark.parametrize('bad', (float('nan'), float('inf'), -float('inf')))
def test_nan_and_inf(bad, layout):
    case = Case((2, 2, 8, 7), layout=layout)
    case.x[0, 0, 4, 3] = bad
    case.x[1, 1, 0, 6] = bad
    values, exact = case.run(), case.expected(independent, torch.float64)
    assert_same_kind(values[0], exact[0])
    assert_same_kind(case.run(relu=True)[0], exact[0].relu())
    assert_same_kind(values[1], exact[1])
    assert_finite_in_the_same_channels(values[2:], exact[2:])
    mean, var = launchers.moments(case.x.to(DEVICE), False)
    assert torch.equal(mean.cpu().isfinite(), torch.tensor([[False, True], [True, False]]))
    assert var.cpu().isnan().tolist() == [[True, False], [False, True]]

    case = Case((2, 2, 8, 7), layout=layout)
    case.grad[1, 0, 7, 0] = bad
    values, exact = case.run(), case.expected(independent, torch.float64)
    assert_same_kind(values[1], exact[1])
    assert_finite_in_the_same_channels(values[2:], exact[2:])


def assert_finite_in_the_same_channels(values, exact):
    """Which taps' gradients are finite beside a border is a matter of the formula; see ops/triton/kernels.py."""
    for value, truth in zip(values, exact):
        finite, expected = (tensor.isfinite().reshape(len(tensor), -1).all(1) for tensor in (value, truth))
        assert torch.equal(finite, expected)


def assert_same_kind(value, truth):
    assert torch.equal(value.isnan(), truth.isnan())
    assert torch.equal(value[value.isinf()].double(), truth[truth.isinf()])
    torch.testing.assert_close(value.double(), truth, rtol=1e-4, atol=1e-4, equal_nan=True)


def compiled(kernel, capability, item, **constants):
    """The kernel for a GPU that need not be here."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    numbers = 'mean rstd weight bias partial grad_mean grad_rstd grad_var saved_mean saved_rstd'.split()
    maps = 'x y residual grad grad_x grad_residual'.split()
    signature = {name: 'i32' for name in kernel.arg_names} | dict.fromkeys(('count', 'eps'), 'fp32')
    signature |= {name: '*fp32' for name in kernel.arg_names if name in numbers}
    signature |= {name: f'*{item}' for name in kernel.arg_names if name in maps}
    signature |= {name: 'constexpr' for name in constants}
    signature = {name: signature[name] for name in kernel.arg_names}
    lanes = constants['OUTER'] * constants['INNER']
    options = {'num_warps': max(1, min(4, lanes // 32))}
    return compile(ASTSource(kernel, signature, constants), GPUTarget('cuda', capability, 32), options)


@compiles
@pytest.mark.parametrize('capability', (80, 90))
@pytest.mark.parametrize('item, channels_last', [('fp32', False), ('bf16', False), ('fp16', True)])
def test_compiles_without_atomics(item, channels_last, capability):
    window, pixels = plans.window_tile(256, 56, channels_last), plans.pixel_tile(256, 56 * 56, channels_last)
    taps = dict(zip(('OUTER', 'INNER', 'VECTOR'), window), CHANNELS_LAST=channels_last, K=3)
    constants = dict(zip(('OUTER', 'INNER', 'VECTOR'), pixels), CHANNELS_LAST=channels_last)
    flags = [name.upper() for name in launchers.BackwardFlags._fields]
    forward = ('RESIDUAL', 'RELU', 'VARIANCE', 'NORMALISED')
    built = [
        compiled(kernels.forward_kernel, capability, item, **dict.fromkeys(forward, True), **taps),
        compiled(kernels.backward_kernel, capability, item, **dict.fromkeys(flags, True), **taps),
        compiled(kernels.moments_kernel, capability, item, **constants),
        compiled(kernels.moments_backward_kernel, capability, item, BY_SAMPLE=False, **constants),
    ]
    for kernel in built:
        assert kernel.asm['cubin']
        assert not re.search(r'\b(atom|red)\.', kernel.asm['ptx'])


@needs_gpu
@pytest.mark.parametrize('layout', LAYOUTS, ids=('nchw', 'channels_last'))
@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('k', (1, 3, 5, 7))
def test_large_maps_on_the_gpu(k, dtype, layout):
    for shape in ((2, 64, 100, 168), (8, 256, 14, 14), (16, 512, 7, 7), (1, 3, 333, 517)):
        check(Case(shape, dtype, k, layout), residual=True, relu=True)
        case = Case(shape, dtype, k, layout)
        check_moments(case.x)
        for first, second in zip(case.run(), case.run()):
            assert torch.equal(first, second)
