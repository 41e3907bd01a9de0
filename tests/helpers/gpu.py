"""Tests that a GPU has to pass: on one where there is one, else on PTX that is executed on the CPU, which is slow."""

from __future__ import annotations

import contextlib
import os

import pytest
import torch
from torch import nn

from bnet_mm import BNET
from helpers import reference

CUDA = torch.cuda.is_available() and os.environ.get('TRITON_INTERPRET') != '1'
DEVICE = 'cuda' if CUDA else 'cpu'
LAYOUTS = {'NCHW': torch.contiguous_format, 'channels_last': torch.channels_last}
DTYPES = {'float32': torch.float32, 'float16': torch.float16, 'bfloat16': torch.bfloat16}
MODES = ('training', 'frozen')
ROUNDING = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}  # allowed, of the largest value
needs_gpu = pytest.mark.skipif(not CUDA, reason='needs a CUDA device: nothing here stands in for it')


def gpu_or_stand_in() -> contextlib.AbstractContextManager:
    """Within it, layers on DEVICE run the GPU kernels."""
    if CUDA:
        return contextlib.nullcontext()
    pytest.importorskip('triton', reason='Triton is not installed')
    from ptx.driver import machine

    return machine(90)


def random_layer(channels: int, k: int, training: bool = True) -> BNET:
    return reference.randomise(BNET(channels, k=k)).to(DEVICE).train(training)


def random_map(shape, dtype=torch.float32, layout=torch.contiguous_format, scale=1.0, shift=0.0) -> torch.Tensor:
    return (torch.randn(shape) * scale + shift).to(dtype).to(DEVICE).contiguous(memory_format=layout)


class Result:
    """y and the gradients in x, residual and the parameters, and the running statistics, all in float64 on the CPU."""

    def __init__(self, y, gradients, running) -> None:
        self.values = dict(y=y, **gradients, **running)
        self.values = {name: value.detach().double().cpu() for name, value in self.values.items()}

    def assert_close(self, exact: Result, dtype: torch.dtype) -> None:
        for name, value in self.values.items():
            truth = exact.values[name]
            error = (value - truth).abs().max() / truth.abs().max()
            assert error <= ROUNDING[torch.float32 if name.startswith('running') else dtype] * len(exact.values), name

    def assert_equal(self, other: Result) -> None:
        for name, value in self.values.items():
            assert torch.equal(value, other.values[name]), name


def run(layer: nn.Module, x, grad, residual=None, relu=False) -> Result:
    """One forward and backward pass of a BNET."""
    inputs = dict(x=x.detach().requires_grad_())
    if residual is not None:
        inputs['residual'] = residual.detach().requires_grad_()
    y = layer(inputs['x'], inputs.get('residual'), relu)
    wanted = {**inputs, **dict(layer.named_parameters())}
    gradients = torch.autograd.grad(y, list(wanted.values()), grad)
    running = {f'running_{kind}': getattr(layer.norm, f'running_{kind}').clone() for kind in ('mean', 'var')}
    return Result(y, dict(zip(wanted, gradients)), running)


def exact(layer: BNET, x, grad, residual=None, relu=False) -> Result:
    """The same in float64 on the CPU from the paper's formula, which leaves the layer as it is."""
    x, grad = x.detach().double().cpu().requires_grad_(), grad.double().cpu()
    parameters = {n: p.detach().double().cpu().requires_grad_() for n, p in layer.named_parameters()}
    running = {f'running_{n}': getattr(layer.norm, f'running_{n}').double().cpu() for n in ('mean', 'var')}
    inputs = dict(x=x)
    if layer.norm.training:
        mean, var = reference.batch_statistics(x)
        count, share = x.numel() // x.shape[1], layer.norm.momentum
        new = dict(running_mean=mean.detach(), running_var=var.detach() * count / (count - 1))
        running = {name: (1 - share) * value + share * new[name] for name, value in running.items()}
    else:
        mean, var = running['running_mean'], running['running_var']
    y = reference.bnet(x, *parameters.values(), mean, var, layer.norm.eps)
    if residual is not None:
        inputs['residual'] = residual.detach().double().cpu().requires_grad_()
        y = y + inputs['residual']
    y = y.relu() if relu else y
    wanted = {**inputs, **parameters}
    return Result(y, dict(zip(wanted, torch.autograd.grad(y, list(wanted.values()), grad))), running)
