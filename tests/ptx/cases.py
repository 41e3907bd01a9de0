"""Calls of the package's operators with random inputs, and the same in float64 by torch's own operators."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bnet_mm.ops.bnet import bnet, moments

EPS = 1e-5
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LAYOUTS = (torch.contiguous_format, torch.channels_last)
NAMES = ('x', 'weight', 'bias', 'mean', 'rstd', 'residual')
# Of the largest value: for what has the map's dtype (which grad_x in training is rounded to twice), and for sums.
MAP_ERROR = {torch.float32: 4e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
SUM_ERROR = 4e-6


@dataclass(frozen=True)
class Case:
    """One call and its gradients.

    statistics: 'batch' or 'samples': computed by moments, gradients through them; 'given': mean and rstd (C,), with
        gradients; 'given samples': (N, C); 'frozen': given, without gradients.
    wanted: Of NAMES, in which gradients are asked for; none: forward only, without autograd.
    """

    shape: tuple[int, int, int, int]
    dtype: torch.dtype = torch.float32
    k: int = 3
    layout: torch.memory_format = torch.contiguous_format
    statistics: str = 'batch'
    residual: bool = False
    relu: bool = False
    wanted: tuple[str, ...] = ('x', 'weight', 'bias')

    def __str__(self) -> str:
        words = ['x'.join(map(str, self.shape)), str(self.dtype)[6:], f'k{self.k}', self.statistics]
        words += ['nhwc'] if self.layout == torch.channels_last else []
        words += [name for name in ('residual', 'relu') if getattr(self, name)]
        if self.wanted != ('x', 'weight', 'bias'):
            words.append('d' + '_'.join(self.wanted))
        return '-'.join(words)

    def inputs(self) -> dict[str, Tensor]:
        """Random tensors by name, and ``grad``, the gradient of the result; parameters are float32."""
        n, c, height, width = self.shape
        numbers = (n, c) if self.statistics == 'given samples' else (c,)
        values = dict(x=torch.randn(self.shape) * 2 + 1, residual=torch.randn(self.shape), grad=torch.randn(self.shape))
        values = {name: one.to(self.dtype).contiguous(memory_format=self.layout) for name, one in values.items()}
        values.update(mean=torch.randn(numbers), rstd=torch.rand(numbers) + 0.5)
        values.update(weight=torch.randn(c, 1, self.k, self.k) / self.k, bias=torch.randn(c))
        return values


def run(case: Case, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """``y`` and the wanted gradients, by name, as the package computes them."""
    return _differentiate(case, inputs, lambda x, over_batch: moments(x, over_batch), bnet)


def expected(case: Case, inputs: dict[str, Tensor], y: Tensor) -> dict[str, Tensor]:
    """The same in float64. ReLU's gradient is that of ``y``, as rounding may move a value across 0."""

    def plain_moments(x, over_batch):
        var, mean = torch.var_mean(x, (0, 2, 3) if over_batch else (2, 3), correction=0)
        return x, mean, var

    def plain_bnet(x, mean, rstd, weight, bias, residual, relu):
        per_map = (-1, x.shape[1], 1, 1)
        x_hat = (x - mean.view(per_map)) * rstd.view(per_map)
        out = F.conv2d(x_hat, weight, bias, padding=weight.shape[-1] // 2, groups=x.shape[1])
        out = out if residual is None else out + residual
        return torch.where(y > 0, out, out.clamp(max=0) * 0) if relu else out

    wide = {name: value.detach().double() for name, value in inputs.items()}
    return _differentiate(case, wide, plain_moments, plain_bnet)


def _differentiate(case: Case, inputs: dict[str, Tensor], get_moments, transform) -> dict[str, Tensor]:
    leaves = {name: inputs[name].detach().requires_grad_(name in case.wanted) for name in NAMES}
    x, mean, rstd = leaves['x'], leaves['mean'], leaves['rstd']
    if case.statistics in ('batch', 'samples'):
        x, mean, var = get_moments(x, case.statistics == 'batch')
        rstd = (var + EPS).rsqrt()
    residual = leaves['residual'] if case.residual else None
    y = transform(x, mean, rstd, leaves['weight'], leaves['bias'], residual, case.relu)
    wanted = [leaves[name] for name in case.wanted]
    gradients = torch.autograd.grad(y, wanted, inputs['grad']) if wanted else ()
    return {'y': y.detach(), **dict(zip(case.wanted, gradients))}


def error(value: Tensor, exact: Tensor) -> float:
    """Of the largest value, or of 0.1 where all are small."""
    return ((value.double() - exact).abs().max() / exact.abs().max().clamp(min=0.1)).item()


def check(case: Case, inputs: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Run a case in a machine and compare; returns what was computed.

    Raises:
        AssertionError: If a value is further from float64's than its dtype explains.
    """
    inputs = case.inputs() if inputs is None else inputs
    got = run(case, inputs)
    exact = expected(case, inputs, got['y'])
    for name, value in got.items():
        is_map = name in ('y', 'x', 'residual')
        allowed = MAP_ERROR[case.dtype] if is_map else SUM_ERROR
        assert value.dtype == (case.dtype if is_map else torch.float32), (str(case), name, value.dtype)
        assert error(value, exact[name]) <= allowed, (str(case), name, error(value, exact[name]))
    return got
