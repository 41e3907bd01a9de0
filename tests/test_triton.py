"""The Triton kernels, in Triton's interpreter without a GPU, and the same tests and more on a GPU.

The interpreter is chosen before Triton's first import, so ``test_in_the_interpreter`` runs this file in a process of
its own. Errors are measured against float64, in units of the two-operator form's own error (normalise, round, conv2d).
"""

import itertools
import os
import re
import subprocess
import sys

import pytest
import reference
import torch
import torch.nn.functional as F

pytest.importorskip('triton', reason='Triton is not installed')
from bnet_mm.ops import triton  # noqa: E402
from bnet_mm.ops.bnet import bnet, moments  # noqa: E402
from bnet_mm.ops.triton import kernels, launchers, plans  # noqa: E402

INTERPRETED = os.environ.get('TRITON_INTERPRET') == '1'
CUDA = torch.cuda.is_available() and not INTERPRETED
DEVICE = 'cuda' if CUDA else 'cpu'
runs_kernels = pytest.mark.skipif(
    not INTERPRETED and not CUDA, reason='no GPU; test_in_the_interpreter runs it in a process of its own'
)
needs_gpu = pytest.mark.skipif(not CUDA, reason='needs a CUDA device')
compiles = pytest.mark.skipif(INTERPRETED, reason='the interpreter does not compile')

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LAYOUTS = (torch.contiguous_format, torch.channels_last)
WIDTHS = (1, 2, 3, 7, 31, 63, 64, 65, 127, 128, 129, 130) if CUDA else (1, 3, 31, 64, 129)  # interpreted: slow


@pytest.mark.skipif(INTERPRETED, reason='is the interpreter')
def test_in_the_interpreter():
    command = [sys.executable, '-m', 'pytest', '-p', 'no:cacheprovider', __file__]
    environment = dict(os.environ, TRITON_INTERPRET='1')
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0 and int(re.search(r'(\d+) passed', run.stdout)[1]) > 50, run.stdout[-6000:] + run.stderr


class Case:
    """Random inputs of one call; numbers (mean, rstd, weight, bias) that the dtype can represent."""

    def __init__(self, shape, dtype=torch.float32, k=3, layout=torch.contiguous_format, by_sample=False):
        n, c = shape[:2]

        def random(*size):
            return torch.randn(size).to(dtype).float()

        def map():
            return torch.randn(shape).to(dtype).contiguous(memory_format=layout)

        self.x, self.residual, self.grad = map() * 2 + 1, map(), map()
        self.mean = random(n, c) if by_sample else random(c)
        self.rstd = torch.rand_like(self.mean) + 0.5
        self.weight, self.bias = random(c, 1, k, k) / k, random(c)

    def inputs(self):
        return self.x, self.mean, self.rstd, self.weight, self.bias

    def run(self, residual=False, relu=False, needs_weight=True, needs_statistics=True):
        """y, and gradients of x, mean, rstd, weight, bias, by the kernels, on the CPU."""
        x, mean, rstd, weight, bias, grad = (tensor.to(DEVICE) for tensor in (*self.inputs(), self.grad))
        other = self.residual.to(DEVICE) if residual else None
        y = launchers.forward(x, mean, rstd, weight, bias, other, relu)
        grad_x, grad_weight, grad_bias, grad_mean, grad_rstd = launchers.backward(
            grad, x, mean, rstd, weight, needs_weight, needs_statistics
        )
        return [tensor.cpu() for tensor in (y, grad_x, grad_mean, grad_rstd, grad_weight, grad_bias)]

    def expected(self, function, dtype, residual=False, relu=False):
        """The same by autograd through ``function``, everything in ``dtype`` but mean and rstd, in float32 at least."""
        wide = torch.promote_types(dtype, torch.float32)
        dtypes = (dtype, wide, wide, dtype, dtype)
        inputs = [tensor.to(kind).requires_grad_() for tensor, kind in zip(self.inputs(), dtypes)]
        y = function(*inputs)
        y.backward(self.grad.to(dtype))
        y = y.detach()
        if residual:
            y = y + self.residual.to(dtype)
        return [y.relu() if relu else y, *(tensor.grad for tensor in inputs)]


def normalise(x, mean, rstd):
    per_map = (-1, x.shape[1], 1, 1)
    return (x - mean.view(per_map)) * rstd.view(per_map)


def independent(x, mean, rstd, weight, bias):
    return reference.depthwise(normalise(x, mean, rstd), weight, bias)


def two_operators(x, mean, rstd, weight, bias):
    x_hat = normalise(x.to(mean.dtype), mean, rstd).to(x.dtype)
    return F.conv2d(x_hat, weight, bias, padding=weight.shape[-1] // 2, groups=x.shape[1])


def error(value, exact):
    return ((value.double() - exact).abs().max() / exact.abs().max().clamp(min=1e-30)).item()


def assert_as_good(values, rounded, exact, floor=8):
    """Error at most 4 times that of ``rounded``; or ``floor`` roundings of float32, where that has nearly none."""
    for name, value, other, truth in zip(('y', 'x', 'mean', 'rstd', 'weight', 'bias'), values, rounded, exact):
        allowed = max(4 * error(other, truth), floor * torch.finfo(torch.float32).eps)
        assert error(value, truth) <= allowed, (name, error(value, truth), error(other, truth))


def check(case, residual=False, relu=False):
    values = case.run(residual, relu)
    assert values[0].dtype == values[1].dtype == case.x.dtype
    assert all(value.dtype == torch.float32 and value.is_contiguous() for value in values[2:])
    for value in values[:2]:
        assert value.is_contiguous(memory_format=torch.channels_last) or case.x.is_contiguous()
        assert value.is_contiguous() or not case.x.is_contiguous()
    exact = case.expected(independent, torch.float64, residual, relu)
    assert_as_good(values, case.expected(two_operators, case.x.dtype, residual, relu), exact)


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
def test_many_programs(monkeypatch):
    """Programs of several samples and strips: what large tensors have, at a small size."""
    for programs, layout in itertools.product((1, 2, 10**6), LAYOUTS):
        monkeypatch.setattr(plans, 'PROGRAMS', programs)
        check(Case((3, 2, 11, 5), layout=layout))
        check_moments(torch.randn(5, 3, 9, 60).contiguous(memory_format=layout))


@runs_kernels
def test_unwanted_sums_are_zero():
    case = Case((2, 3, 5, 4))
    values = case.run()
    for needs_weight, needs_statistics in itertools.product((False, True), repeat=2):
        y, grad_x, grad_mean, grad_rstd, grad_weight, grad_bias = case.run(False, False, needs_weight, needs_statistics)
        wanted = dict(zip((0, 1, 5), (y, grad_x, grad_bias)))
        wanted.update({2: grad_mean, 3: grad_rstd} if needs_statistics else {})
        wanted.update({4: grad_weight} if needs_weight else {})
        assert all(torch.equal(tensor, values[i]) for i, tensor in wanted.items())
        assert needs_weight or not grad_weight.any()
        assert needs_statistics or not (grad_mean.any() or grad_rstd.any())


def check_moments(x, floor=8):
    for over_batch in (True, False):
        mean, var = (tensor.cpu() for tensor in launchers.moments(x.to(DEVICE), over_batch))
        axes = (0, 2, 3) if over_batch else (2, 3)
        exact_var, exact_mean = torch.var_mean(x.double(), axes, correction=0)
        rounded_var, rounded_mean = torch.var_mean(x.float(), axes, correction=0)
        assert mean.dtype == var.dtype == torch.float32 and mean.is_contiguous() and var.is_contiguous()
        assert mean.shape == var.shape == exact_mean.shape
        assert_as_good((mean, var), (rounded_mean, rounded_var), (exact_mean, exact_var), floor)


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
@pytest.mark.parametrize('by_sample', (False, True))
@pytest.mark.parametrize('k', (1, 5))
def test_training_pass(k, by_sample, layout, monkeypatch):
    """Batch statistics end to end, gradients through them included."""
    monkeypatch.setenv('BNET_MM_BACKEND', 'triton')
    case = Case((3, 4, 6, 5), k=k, layout=layout)

    def train(device, kind, transform, statistics):
        x, weight, bias = (
            tensor.to(device, kind).requires_grad_() for tensor in (case.x.detach(), case.weight, case.bias)
        )
        same_x, mean, var = statistics(x * 1, not by_sample)
        y = transform(same_x, mean, (var + 1e-5).rsqrt(), weight, bias, case.residual.to(device, kind), True)
        y.backward(case.grad.to(device, kind))
        return [tensor.detach().cpu() for tensor in (y, x.grad, weight.grad, bias.grad)]

    def plain_moments(x, over_batch):
        var, mean = torch.var_mean(x, (0, 2, 3) if over_batch else (2, 3), correction=0)
        return x, mean, var

    def plain(function):
        return lambda *arguments: (function(*arguments[:5]) + arguments[5]).relu()

    exact = train('cpu', torch.float64, plain(independent), plain_moments)
    rounded = train('cpu', torch.float32, plain(two_operators), plain_moments)
    assert_as_good(train(DEVICE, torch.float32, bnet, moments), rounded, exact)


@runs_kernels
def test_equal_bits_on_every_run():
    for layout in LAYOUTS:
        case = Case((2, 3, 9, 6), layout=layout)
        for first, second in zip(case.run(), case.run()):
            assert torch.equal(first, second)
        x = case.x.to(DEVICE)
        for first, second in zip(launchers.moments(x, True), launchers.moments(x, True)):
            assert torch.equal(first, second)


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


@runs_kernels
def test_other_strides_are_copied():
    numbers = [tensor.to(DEVICE) for tensor in Case((2, 3, 7, 9)).inputs()[1:]]
    wide = torch.randn(2, 6, 9, 20).to(DEVICE)
    sliced, expanded = wide[:, ::2, :7, 1:10], wide[:1, :3, :1, :9].expand(2, 3, 7, 9)
    transposed = wide[:, :3, :, :7].transpose(2, 3)
    for x, grad in ((sliced, expanded), (expanded, transposed), (transposed, sliced)):
        same_x, same_grad = x.contiguous(), grad.contiguous()
        y = launchers.forward(x, *numbers, grad, False)
        assert torch.equal(y, launchers.forward(same_x, *numbers, same_grad, False))
        found = launchers.backward(grad, x, *numbers[:3], True, True)
        for value, same in zip(found, launchers.backward(same_grad, same_x, *numbers[:3], True, True)):
            assert torch.equal(value, same)
        for value, same in zip(launchers.moments(x, True), launchers.moments(same_x, True)):
            assert torch.equal(value, same)
    x = wide[:, :3, :7, :9].contiguous()
    last = x.contiguous(memory_format=torch.channels_last)
    y = launchers.forward(x, *numbers, last, True)
    assert y.is_contiguous() and torch.equal(y, launchers.forward(x, *numbers, x, True))
    numbers = [torch.stack([tensor, tensor], -1)[..., 0] for tensor in numbers]  # not contiguous
    assert torch.equal(y, launchers.forward(x, *numbers, x, True))


@runs_kernels
def test_nothing_beyond_the_tensors_is_touched():
    """The tensors lie within larger ones of NaN, and what is around the results stays."""
    case = Case((2, 3, 5, 7), k=7)
    for layout in LAYOUTS:

        def island(tensor, layout=layout):
            around = torch.full((tensor.numel() + 64,), float('nan'), device=DEVICE)
            strides = tensor.contiguous(memory_format=layout).stride() if tensor.dim() == 4 else tensor.stride()
            inside = around.as_strided(tensor.shape, strides, 32).copy_(tensor)
            return inside, around

        x, mean, rstd, weight, bias = (island(tensor)[0] for tensor in case.inputs())
        assert launchers.forward(x, mean, rstd, weight, bias, None, False).isfinite().all()
        grad, around = island(case.grad)
        assert all(tensor.isfinite().all() for tensor in launchers.backward(grad, x, mean, rstd, weight, True, True))
        assert all(tensor.isfinite().all() for tensor in launchers.moments(x, True))
        launchers.moments_backward(grad, x, mean, mean, rstd)
        assert grad.isfinite().all() and around[:32].isnan().all() and around[-32:].isnan().all()


@runs_kernels
def test_refusals_name_the_argument():
    case = Case((2, 3, 5, 7))
    x, mean, rstd, weight, bias = (tensor.to(DEVICE) for tensor in case.inputs())
    wrong = (
        ('x must be 4-D', ValueError, (x[0], mean, rstd, weight, bias, None)),
        ('x must be 4-D', ValueError, (x[:0], mean, rstd, weight, bias, None)),
        ('x must be float32', TypeError, (x.double(), mean, rstd, weight, bias, None)),
        ('mean must be', ValueError, (x, mean[:2], rstd, weight, bias, None)),
        ('rstd must be', ValueError, (x, mean, rstd[:2], weight, bias, None)),
        ('mean must be', TypeError, (x, mean.double(), rstd, weight, bias, None)),
        ('weight must be', ValueError, (x, mean, rstd, weight[..., :2, :2], bias, None)),
        ('weight must be', ValueError, (x, mean, rstd, weight[:2], bias, None)),
        ('bias must be', ValueError, (x, mean, rstd, weight, bias[:2], None)),
        ('residual must be', ValueError, (x, mean, rstd, weight, bias, x[:1])),
        ('residual must be', TypeError, (x, mean, rstd, weight, bias, x.half())),
    )
    for message, kind, arguments in wrong:
        with pytest.raises(kind, match=message):
            launchers.forward(*arguments, False)
    with pytest.raises(ValueError, match='grad must be'):
        launchers.backward(x[:1], x, mean, rstd, weight, True, True)
    with pytest.raises(ValueError, match='grad_var must be'):
        launchers.moments_backward(x.clone(), x, mean, mean, mean[:1])
    with pytest.raises(ValueError, match='grad_x must be contiguous'):
        launchers.moments_backward(x.transpose(2, 3).contiguous().transpose(2, 3), x, mean, mean, mean)


def test_plans_cover_every_map_once():
    sizes = (1, 2, 3, 7, 8, 14, 17, 56, 127, 130, 200, 336, 3000)
    for height, width, channels, k in itertools.product(sizes, sizes, (1, 3, 64, 256, 2048), (1, 3, 5, 7)):
        for samples, channels_last, item in itertools.product((1, 64), (False, True), (2, 4)):
            plan = plans.plan_windows((samples, channels, height, width), k, channels_last, item, samples == 64)
            tile = plan.tile
            across, along = (tile.inner, tile.outer) if channels_last else (tile.outer, tile.inner)
            channel_tiles, rest = divmod(plan.tiles, plan.column_tiles)
            assert rest == 0 and covers(channel_tiles, across, channels)
            assert covers(plan.column_tiles, along * tile.columns, width)
            assert plan.rows_each % tile.rows == 0 and covers(plan.strips, plan.rows_each, height)
            assert covers(plan.groups, plan.samples_each, samples) and (samples == 1 or plan.samples_each == 1)
            assert all(value & (value - 1) == 0 for value in tile) and tile.outer * tile.inner <= 128
            assert plan.rows_each * tile.columns * plan.samples_each <= max(plans.TERMS, tile.rows * tile.columns)
            assert plans.warps(tile) in (1, 2, 4)


def covers(parts, size, length):
    return (parts - 1) * size < length <= parts * size


def test_plans_of_the_benchmarked_layers():
    """The table as it stands; a change of it is a change of speed, never of results."""
    big, small = (16, 256, 200, 336), (64, 1024, 14, 14)
    tiles = {
        (big, 3, False, 4): (4, 32, 8, 1), (big, 3, False, 2): (2, 64, 8, 2), (big, 7, False, 2): (2, 64, 4, 2),
        (big, 5, True, 4): (2, 64, 4, 4), (big, 7, True, 2): (2, 64, 4, 2), (big, 1, False, 2): (4, 32, 8, 1),
        (small, 3, False, 4): (8, 16, 8, 1), (small, 3, False, 2): (16, 8, 8, 2), (small, 5, True, 2): (2, 64, 4, 4),
    }  # fmt: skip
    for (shape, k, channels_last, item), tile in tiles.items():
        plan = plans.plan_windows(shape, k, channels_last, item, False)
        assert plan.tile == tile and 2000 <= plan.programs <= 20000, (shape, k, channels_last, item, plan)
    for shape, channels_last in itertools.product((big, small), (False, True)):
        assert 1000 <= plans.plan_pixels(shape, channels_last, False).programs <= 20000


def test_load_says_what_is_missing():
    if INTERPRETED or CUDA:
        assert triton.load().startswith('Triton 3') and triton.load().endswith('interpreter') == INTERPRETED
        assert torch._C._dispatch_has_kernel_for_dispatch_key('bnet_mm::forward', 'CUDA' if CUDA else 'CPU')
    else:
        with pytest.raises(ImportError, match='no CUDA device'):
            triton.load()


def compiled(kernel, capability, item, **constants):
    """The kernel for a GPU that need not be here."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    numbers = ('mean', 'rstd', 'weight', 'bias', 'partial', 'grad_mean', 'grad_var')
    signature = {name: 'i32' for name in kernel.arg_names} | {'count': 'fp32'}
    signature |= {name: '*fp32' for name in numbers} | {name: 'constexpr' for name in constants}
    signature |= {name: f'*{item}' for name in ('x', 'y', 'residual', 'grad', 'grad_x')}
    signature = {name: signature[name] for name in kernel.arg_names}
    options = {'num_warps': plans.warps(plans.Tile(constants['OUTER'], constants['INNER'], 1, 1))}
    return compile(ASTSource(kernel, signature, constants), GPUTarget('cuda', capability, 32), options)


@compiles
@pytest.mark.parametrize('capability', (80, 90))
@pytest.mark.parametrize('item, channels_last', [('fp32', False), ('bf16', False), ('fp16', True)])
def test_compiles_without_atomics(item, channels_last, capability):
    shape, size = (16, 256, 56, 56), 4 if item == 'fp32' else 2
    tile = plans.plan_windows(shape, 3, channels_last, size, False).tile
    constants = dict(OUTER=tile.outer, INNER=tile.inner, CHANNELS_LAST=channels_last)
    taps = dict(constants, ROWS=tile.rows, COLUMNS=tile.columns, K=3)
    built = [
        compiled(kernels.forward_kernel, capability, item, RESIDUAL=True, RELU=True, **taps),
        compiled(kernels.backward_kernel, capability, item, WEIGHT=True, STATISTICS=True, **taps),
        compiled(kernels.moments_kernel, capability, item, DEPTH=8, **constants),
        compiled(kernels.moments_backward_kernel, capability, item, DEPTH=4, BY_SAMPLE=False, **constants),
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


@needs_gpu
@pytest.mark.parametrize('layout', LAYOUTS, ids=('nchw', 'channels_last'))
def test_more_than_2_31_elements(layout):
    x = torch.empty(3, 50000, 120, 120, device='cuda', dtype=torch.bfloat16, memory_format=layout).normal_()
    numbers = [tensor.cuda() for tensor in Case((1, 50000, 1, 1)).inputs()[1:]]
    own_x, own = x[-1:, -64:].contiguous(memory_format=layout), [tensor[-64:] for tensor in numbers]
    y = launchers.forward(x, *numbers, None, False)
    assert torch.equal(y[-1:, -64:], launchers.forward(own_x, *own, None, False))
    del y
    grad_x = launchers.backward(x, x, *numbers[:3], True, True)[0]
    assert torch.equal(grad_x[-1:, -64:], launchers.backward(own_x, own_x, *own[:3], True, True)[0])
    mean, _ = launchers.moments(x, False)
    torch.testing.assert_close(mean[-1, -64:], launchers.moments(own_x, False)[0][0])


@needs_gpu
def test_torch_compile_on_the_gpu():
    case = Case((2, 8, 20, 20))
    inputs = [tensor.cuda().requires_grad_() for tensor in case.inputs()]
    eager = bnet(*inputs)
    graph = torch.compile(lambda *tensors: bnet(*tensors).relu(), fullgraph=True)(*inputs)
    assert torch.equal(graph, eager.relu())
    grads = [torch.autograd.grad(y.sum(), inputs) for y in (graph, eager.relu())]
    assert all(torch.equal(first, second) for first, second in zip(*grads))
