"""Faults that users of such layers report: function transforms, live buffers, gradient strides, waits for a device.

The measure is what BatchNorm2d followed by a depthwise Conv2d does there.
"""

import copy
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.autograd.forward_ad as fwAD
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.autograd.functional import hessian, jacobian
from torch.utils._python_dispatch import TorchDispatchMode

from bnet_mm import BNET
from bnet_mm.layers.sync_batch_norm import _JoinStatistics
from bnet_mm.ops.bnet import bnet, moments
from bnet_mm.ops.dispatch import load_backend

BUILT, WHY = load_backend('cpp')
compiled = pytest.mark.skipif(not BUILT, reason=f'no C++ extension: {WHY}')
BACKENDS = [pytest.param('cpp', marks=compiled), 'reference']
KINDS = {
    'BN': {}, 'BN plain average': dict(momentum=None), 'BN untracked': dict(track_running_stats=False),
    'SyncBN': dict(norm='SyncBN'), 'GN': dict(norm=dict(type='GN', num_groups=2)), 'IN': dict(norm='IN'),
    'SN': dict(norm='SN'), 'SyncSN': dict(norm='SyncSN'),
}  # fmt: skip


def layer_of(kind, k=3, channels=4):
    """Random parameters and running statistics."""
    layer = BNET(channels, k, **KINDS[kind])
    for name, tensor in layer.state_dict().items():
        if tensor.is_floating_point():
            torch.nn.init.uniform_(tensor, *(0.5, 2) if 'var' in name else (-1, 1))
    return layer


def two_operators(norm, x, weight, bias):
    return F.conv2d(norm(x), weight, bias, padding=weight.shape[-1] // 2, groups=x.shape[1])


# --- Function transforms, begun before the forward pass or after it


@pytest.fixture(params=KINDS)
def double_layer(request):
    return layer_of(request.param, channels=2 if 'GN' not in request.param else 4).double()


def reference_of(function, monkeypatch):
    """The value by torch's own operators, one row at a time."""
    with monkeypatch.context() as patch:
        patch.setenv('BNET_MM_BACKEND', 'reference')
        return function()


@compiled
@pytest.mark.parametrize('training', [True, False])
def test_vectorised_jacobian_and_hessian(double_layer, training, monkeypatch):
    layer = double_layer.train(training)
    x = torch.randn(2, layer.num_features, 3, 2, dtype=torch.float64)

    def loss(x):
        return layer(x).tanh().square().sum()

    want = reference_of(lambda: jacobian(layer, x), monkeypatch)
    torch.testing.assert_close(jacobian(layer, x, vectorize=True), want)
    torch.testing.assert_close(jacobian(layer, x, vectorize=True, strategy='forward-mode'), want)
    want = reference_of(lambda: hessian(loss, x), monkeypatch)
    torch.testing.assert_close(hessian(loss, x, vectorize=True), want)
    if not isinstance(layer.norm, nn.GroupNorm):  # which torch itself cannot
        got = hessian(loss, x, vectorize=True, outer_jacobian_strategy='forward-mode')
        torch.testing.assert_close(got, want)


@compiled
@pytest.mark.parametrize('how', ['is_grads_batched', 'vmap'])
@pytest.mark.parametrize('training', [True, False])
def test_batched_gradients_of_a_pass_by_the_kernels(double_layer, training, how, monkeypatch):
    layer = double_layer.train(training)
    x = torch.randn(3, layer.num_features, 4, 5, dtype=torch.float64, requires_grad=True)
    inputs = [x, *layer.parameters()]
    y = layer(x)
    directions = torch.randn(3, *y.shape, dtype=torch.float64)
    want = [torch.autograd.grad(y, inputs, direction, retain_graph=True) for direction in directions]
    if how == 'vmap':
        got = torch.func.vmap(lambda v: torch.autograd.grad(y, inputs, v, retain_graph=True))(directions)
    else:
        got = torch.autograd.grad(y, inputs, directions, retain_graph=True, is_grads_batched=True)
    for value, *rows in zip(got, *want):
        assert not value.requires_grad
        torch.testing.assert_close(value, torch.stack(rows))


@compiled
def test_batched_gradients_with_residual_and_relu():
    x, residual = (torch.randn(2, 3, 5, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight = torch.randn(3, 1, 3, 3, dtype=torch.float64, requires_grad=True)
    maps, mean, var = moments(x, over_batch=False)
    inputs = [x, residual, weight]
    for relu in (True, False):
        y = bnet(maps, mean, (var + 1).rsqrt(), weight, weight[:, 0, 0, 0], residual, relu)
        directions = torch.randn(3, *y.shape, dtype=torch.float64)
        want = [torch.autograd.grad(y, inputs, direction, retain_graph=True) for direction in directions]
        got = torch.autograd.grad(y, inputs, directions, retain_graph=True, is_grads_batched=True)
        for value, *rows in zip(got, *want):
            torch.testing.assert_close(value, torch.stack(rows))


@compiled
@pytest.mark.parametrize('training', [True, False])
def test_forward_mode(double_layer, training):
    """Of the input, and of a parameter; and of the gradient of a pass that the kernels ran."""
    layer = double_layer.train(training)
    x, direction = torch.randn(2, 2, layer.num_features, 4, 3, dtype=torch.float64)
    twin = copy.deepcopy(layer)
    _, want = torch.autograd.functional.jvp(twin, x, direction)  # by two backward passes
    with fwAD.dual_level():
        got = fwAD.unpack_dual(copy.deepcopy(layer)(fwAD.make_dual(x, direction))).tangent
    torch.testing.assert_close(got, want)

    weight = layer.bnconv.weight.detach()
    toward = torch.randn_like(weight)

    def of_weight(weight):
        return torch.func.functional_call(copy.deepcopy(layer), {'bnconv.weight': weight}, (x,))

    _, want = torch.autograd.functional.jvp(of_weight, weight, toward)
    with fwAD.dual_level():
        got = fwAD.unpack_dual(of_weight(fwAD.make_dual(weight, toward))).tangent
    torch.testing.assert_close(got, want)

    leaf = x.clone().requires_grad_()
    y = layer(leaf)
    (want,) = torch.autograd.grad(y, leaf, direction, retain_graph=True)  # linear in what comes in
    with fwAD.dual_level():
        (grad,) = torch.autograd.grad(y, leaf, fwAD.make_dual(x, direction), retain_graph=True)
        torch.testing.assert_close(fwAD.unpack_dual(grad).tangent, want)


# --- Buffers that change before the backward pass


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('kind', KINDS)
def test_a_training_pass_before_the_backward_pass_of_an_evaluation(kind, backend, monkeypatch):
    """Its gradients are those of the statistics that it used."""
    monkeypatch.setenv('BNET_MM_BACKEND', backend)
    layer = layer_of(kind)
    x = torch.randn(3, 4, 5, 6, requires_grad=True)
    inputs, grad = [x, *layer.parameters()], torch.randn(3, 4, 5, 6)
    want = torch.autograd.grad(layer.eval()(x), inputs, grad)
    y = layer.eval()(x)
    buffers = [buffer for name, buffer in layer.named_buffers() if name in layer.state_dict()]
    before = [buffer.clone() for buffer in buffers]
    layer.train()(x.detach() * 3 + 1)
    assert all(not torch.equal(now, then) for now, then in zip(buffers, before))
    for value, expected in zip(torch.autograd.grad(y, inputs, grad), want):
        assert torch.equal(value, expected)


@compiled
def test_only_numbers_per_channel_are_copied():
    """Of an evaluation with gradients: the map itself, the taps, and what goes with the channels."""
    layer, saved = layer_of('BN').eval(), {}
    x = torch.randn(2, 4, 64, 64, requires_grad=True)

    def keep(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(x)
    assert x.nbytes <= sum(saved.values()) <= 1.01 * x.nbytes
    assert layer.norm.running_mean.untyped_storage().data_ptr() not in saved


# --- Strides of gradients


LAST = torch.channels_last


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('k', [1, 3, 5, 7])
@pytest.mark.parametrize('kind', KINDS)
def test_gradients_have_the_strides_of_their_parameters(kind, k, backend, monkeypatch):
    monkeypatch.setenv('BNET_MM_BACKEND', backend)
    for layout in (LAST, torch.contiguous_format):
        layer = layer_of(kind, k).to(memory_format=layout)
        for map_layout in (LAST, torch.contiguous_format):
            if (backend, layout, map_layout) == ('reference', torch.contiguous_format, LAST):
                continue  # torch's own Conv2d does not
            x = torch.randn(2, 4, 5, 6).to(memory_format=map_layout).requires_grad_()
            for training in (True, False):
                y = layer.train(training)(x)
                y.square().sum().backward()
                if backend == 'cpp':  # else torch's operators decide
                    assert x.grad.stride() == y.stride() == x.stride()
                for name, parameter in layer.named_parameters():
                    assert parameter.grad.stride() == parameter.stride(), name
                layer.zero_grad()
                x.grad = None


@compiled
def test_strides_of_gradients_of_any_parameters():
    """As the operation returns them, also for parameters that are views of something else."""
    x = torch.randn(2, 4, 5, 6)
    numbers = torch.randn(2, 4)
    taps = torch.randn(4, 1, 3, 3)
    permuted = torch.randn(3, 3, 1, 4).permute(3, 2, 0, 1)
    for weight in (taps, taps.to(memory_format=LAST), taps.transpose(2, 3), permuted):
        leaf = weight.detach().requires_grad_()
        (grad,) = torch.autograd.grad(bnet(x, *numbers, leaf, numbers[0]).sin().sum(), leaf)
        same = weight.detach().contiguous().requires_grad_()
        (want,) = torch.autograd.grad(bnet(x, *numbers, same, numbers[0]).sin().sum(), same)
        assert grad.stride() == weight.stride() and torch.equal(grad, want)


DATA_PARALLEL = """
import torch, torch.distributed as dist
from torch import nn
from bnet_mm import BNET
dist.init_process_group('gloo', init_method='tcp://127.0.0.1:{port}', rank=0, world_size=1)
norms = {norms!r}
layers = [layer for norm in norms for layer in (nn.Conv2d(4, 4, 3, padding=1), BNET(4, 3, norm=norm))]
model = nn.Sequential(*layers).to(memory_format=torch.channels_last)
model = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view={view})
for _ in range(2):
    model(torch.randn(2, 4, 6, 6).to(memory_format=torch.channels_last)).square().sum().backward()
"""


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('view', [True, False])
def test_data_parallel_training_in_channels_last_warns_of_nothing(view, backend):
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    norms = ['BN', 'SyncBN', dict(type='GN', num_groups=2), 'IN', 'SN', 'SyncSN']
    paths = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get('PYTHONPATH', '')])
    done = subprocess.run(
        [sys.executable, '-W', 'always', '-c', DATA_PARALLEL.format(port=port, norms=norms, view=view)],
        env=dict(os.environ, PYTHONPATH=paths, BNET_MM_BACKEND=backend), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0 and 'bucket view' not in done.stderr, done.stderr


# --- No wait for a device on the path of a step


class NoCopies(TorchDispatchMode):
    """Forbids to read a tensor from Python, and to make one of Python's numbers: on a GPU, both wait for it."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.split('.')[0]
        assert name not in ('_local_scalar_dense', 'item', 'lift_fresh', 'is_nonzero', 'nonzero', 'equal'), name
        return function(*args, **kwargs or {})


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('kind', [*KINDS, 'SyncBN plain average'])
def test_a_step_copies_nothing_to_the_host(kind, backend, monkeypatch):
    monkeypatch.setenv('BNET_MM_BACKEND', backend)
    options = KINDS[kind] if kind in KINDS else dict(norm='SyncBN', momentum=None)
    layer = BNET(4, 3, **options)
    x = torch.randn(3, 4, 5, 6, requires_grad=True)
    with NoCopies():
        layer(x).square().sum().backward()
        layer.eval()(x).square().sum().backward()


def test_the_plain_average_is_that_of_torch(monkeypatch):
    for backend in ('auto', 'reference'):
        monkeypatch.setenv('BNET_MM_BACKEND', backend)
        for dtype in (torch.float32, torch.float64):
            layer, plain = BNET(4, 3, momentum=None).to(dtype), nn.BatchNorm2d(4, momentum=None).to(dtype)
            for _ in range(3):
                x = torch.randn(3, 4, 5, 6, dtype=dtype) * 2 + 1
                layer(x)
                plain(x)
            for name, value in plain.named_buffers():
                torch.testing.assert_close(getattr(layer.norm, name), value)


def test_joined_statistics_copy_nothing_to_the_host(tmp_path):
    dist.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    try:
        mean, var = torch.randn(4, requires_grad=True), torch.rand(4, requires_grad=True)
        with NoCopies():
            joint_mean, joint_var, total = _JoinStatistics.apply(mean, var, 30, None)
            (joint_mean + joint_var).sum().backward()
        assert total == 30 and torch.equal(joint_mean, mean) and torch.equal(joint_var, var)
    finally:
        dist.destroy_process_group()
