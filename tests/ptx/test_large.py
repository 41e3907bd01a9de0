"""Maps beyond 2^31 elements, in memory that is never touched but where the last programs read and write."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip('triton', reason='Triton is not installed')
from bnet_mm.ops.triton import launchers  # noqa: E402
from bnet_mm.ops.triton.plans import plan_windows  # noqa: E402
from ptx.cases import LAYOUTS, error  # noqa: E402
from ptx.driver import machine  # noqa: E402

SHAPE = (4, 300, 1400, 1300)
SAMPLES, CHANNELS, HEIGHT, WIDTH = SHAPE
LAST = slice(CHANNELS - 2, CHANNELS)  # channels whose values are compared
ROWS, MARGIN = 16, 8  # last rows of them, and rows above that the compared ones depend on
COLUMNS, TILES = 8, 3  # last columns, and tiles of columns that run
DTYPE = torch.float16


@pytest.fixture(params=LAYOUTS, ids=('nchw', 'nhwc'))
def layout(request):
    return request.param


def untouched(layout):
    return torch.empty(SHAPE, dtype=DTYPE, memory_format=layout)


def filled(layout):
    """Random in the last rows of the last channels of the last sample."""
    tensor = untouched(layout)
    tensor[-1, LAST, HEIGHT - ROWS - MARGIN :] = torch.randn(2, ROWS + MARGIN, WIDTH).to(DTYPE)
    return tensor


def region(tensor):
    return tensor[-1, LAST, HEIGHT - ROWS - MARGIN :].double()


def compared(tensor):
    return region(tensor)[:, MARGIN:, -COLUMNS:]


def test_forward_and_backward(layout):
    assert torch.Size(SHAPE).numel() > 2**31
    x, grad = filled(layout), filled(layout)
    mean, rstd, bias = torch.randn(CHANNELS), torch.rand(CHANNELS) + 0.5, torch.randn(CHANNELS)
    weight = torch.randn(CHANNELS, 1, 3, 3)
    per_map = (-1, 1, 1)
    x_hat = (region(x) - mean[LAST].double().view(per_map)) * rstd[LAST].double().view(per_map)
    exact_y = F.conv2d(x_hat[None], weight[LAST].double(), bias[LAST].double(), padding=1, groups=2)[0]
    exact_grad = F.conv_transpose2d(region(grad)[None], weight[LAST].double(), padding=1, groups=2)[0]
    exact_grad = exact_grad * rstd[LAST].double().view(per_map)
    with machine(fresh_is_nan=False) as gpu:
        gpu.only = last_programs(layout)
        y = launchers.forward(x, mean, rstd, weight, bias, None, False)
        assert error(compared(y), exact_y[:, MARGIN:, -COLUMNS:]) < 2e-3
        grad_x = launchers.backward(grad, x, mean, rstd, weight, True, True)[0]
        assert error(compared(grad_x), exact_grad[:, MARGIN:, -COLUMNS:]) < 2e-3
        assert [done.kernel for done in gpu.launches][0] == 'forward_kernel'


def test_moments(layout):
    """The last program's lines; and the gradient of the last values."""
    x = filled(layout)
    mean, grad_mean, grad_var = (torch.randn(CHANNELS) for _ in range(3))
    with machine(fresh_is_nan=False) as gpu:
        gpu.only = lambda kernel, programs: range(programs - 600, programs)
        grad_x = filled(layout)
        before = region(grad_x)[:, -1]
        launchers.moments_backward(grad_x, x, mean, grad_mean, grad_var)
        count = SAMPLES * HEIGHT * WIDTH
        shift, scale = grad_mean[LAST].double() / count, 2 * grad_var[LAST].double() / count
        exact = before + shift.view(-1, 1) + scale.view(-1, 1) * (region(x)[:, -1] - mean[LAST].double().view(-1, 1))
        assert error(region(grad_x)[:, -1], exact) < 1e-3
        gpu.only = lambda kernel, programs: range(programs - 2, programs) if kernel == 'moments_kernel' else []
        launchers.moments(x, True)  # no address outside of x
        assert gpu.launches[-2].kernel == 'moments_kernel' and gpu.launches[-2].counts['instructions'] > 0


def last_programs(layout):
    """Programs of the compared values: the last strips of the last items, of the last tile of channels."""
    plan = plan_windows(torch.Size(SHAPE), 3, layout == torch.channels_last, by_sample=False, sums=False)
    assert plan == plan_windows(torch.Size(SHAPE), 3, layout == torch.channels_last, by_sample=False, sums=True)
    strips = -(-(ROWS + MARGIN) // plan.rows_each)
    chosen = [
        (group * plan.strips + strip) * plan.tiles + plan.tiles - 1
        for group in range(plan.groups - TILES, plan.groups)
        for strip in range(plan.strips - strips, plan.strips)
    ]
    return lambda kernel, programs: chosen if kernel in ('forward_kernel', 'backward_kernel') else []
