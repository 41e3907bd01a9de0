"""Cases for the Triton kernels: in Triton's interpreter without a GPU, and on a GPU.

Errors are measured against float64, in units of the two-operator form's own error (normalise, round, conv2d).
"""

import os

import pytest
import torch
import torch.nn.functional as F

from helpers import reference

pytest.importorskip('triton', reason='Triton is not installed')

from bnet_mm.ops.triton import launchers  # noqa: E402

INTERPRETED = os.environ.get('TRITON_INTERPRET') == '1'
CUDA = torch.cuda.is_available() and not INTERPRETED
DEVICE = 'cuda' if CUDA else 'cpu'
runs_kernels = pytest.mark.skipif(
    not INTERPRETED and not CUDA, reason='no GPU; test_in_the_interpreter runs it in a process of its own'
)
needs_gpu = pytest.mark.skipif(not CUDA, reason='needs a CUDA device')
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LAYOUTS = (torch.contiguous_format, torch.channels_last)


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


def check_moments(x, floor=8):
    for over_batch in (True, False):
        mean, var = (tensor.cpu() for tensor in launchers.moments(x.to(DEVICE), over_batch))
        axes = (0, 2, 3) if over_batch else (2, 3)
        exact_var, exact_mean = torch.var_mean(x.double(), axes, correction=0)
        rounded_var, rounded_mean = torch.var_mean(x.float(), axes, correction=0)
        assert mean.dtype == var.dtype == torch.float32 and mean.is_contiguous() and var.is_contiguous()
        assert mean.shape == var.shape == exact_mean.shape
        # A mean near 0 is as good as one a deviation away from it: what matters are differences from it.
        away = exact_mean.sign() * exact_var.sqrt()
        means = (one + away for one in (mean, rounded_mean, exact_mean))
        assert_as_good(*zip(means, (var, rounded_var, exact_var)), floor)
