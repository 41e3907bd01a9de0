"""The kernels in autocast, compilers, tracers, torch.func and checkpointing."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from bnet_mm import BNET
from bnet_mm.ops.bnet import bnet, moments
from helpers import reference
from helpers.kernels import BUILT, DTYPES, Calls, compiled, make_inputs, rms, run


@pytest.mark.parametrize('backend', [pytest.param('cpp', marks=compiled), 'reference'])
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_autocast_does_not_lower_the_arithmetic(dtype, backend, monkeypatch):
    """The operation says how it computes; the dtype of the map is that of the result."""
    monkeypatch.setenv('BNET_MM_BACKEND', backend)
    values = make_inputs((2, 5, 7, 9), 3, DTYPES[dtype], residual=True)
    grad = torch.randn(2, 5, 7, 9).to(DTYPES[dtype])
    want = run(bnet, values, grad)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        got = run(bnet, values, grad)
        same, mean, var = moments(values['x'], True)
    assert all(torch.equal(got[name], value) for name, value in want.items())
    assert same.x.dtype == DTYPES[dtype] and mean.dtype == var.dtype == torch.float32


@compiled
@pytest.mark.parametrize('training', [True, False])
def test_model_under_autocast(training):
    """Outputs, gradients and statistics are near those in float32; parameters and statistics stay float32."""
    convs = [nn.Conv2d(3, 8, 3, bias=False), nn.Conv2d(8, 8, 1, bias=False)]
    model = reference.randomise(nn.Sequential(convs[0], BNET(8, 3), nn.ReLU(), convs[1], BNET(8, 5)))
    x, grad, results = torch.randn(4, 3, 12, 13), torch.randn(4, 8, 10, 11), []
    for enabled in (True, False):
        twin = copy.deepcopy(model).train(training)
        with Calls() as calls, torch.autocast('cpu', dtype=torch.bfloat16, enabled=enabled):
            y = twin(x)
        assert calls.names.count('norm') == 2 and y.dtype == (torch.bfloat16 if enabled else torch.float32)
        (y.float() * grad).sum().backward()
        results.append([y.float().detach(), *(p.grad for p in twin.parameters()), *twin.buffers()])
    for low, full in zip(*results):
        assert low.dtype == full.dtype and rms(low - full) <= 0.05 * rms(full) + 0.05


def small_model():
    layers = [nn.Conv2d(3, 4, 3), BNET(4, 3), nn.ReLU(), BNET(4, 5, norm='IN'), BNET(4, 7, norm='SyncBN')]
    return reference.randomise(nn.Sequential(*layers))


@pytest.mark.parametrize('training', [True, False])
def test_torch_compile(training):
    """In one graph, with the kernels inside: outputs, gradients and running statistics, twice."""
    model = small_model().train(training)
    twin = copy.deepcopy(model)
    fast = torch.compile(twin, backend='aot_eager', fullgraph=True)
    for step in range(2):
        x, runs = torch.randn(2, 3, 9, 10) + step, []
        for function in (model, fast):
            leaf = x.clone().requires_grad_()
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
                y = function(leaf)
                y.square().sum().backward()
            calls = sorted(event.name for event in profile.events() if event.name.startswith('bnet_mm::'))
            parts = 12 if training and function is fast else 8  # outside of graphs, batch norm is one operation
            assert len(calls) == (parts if BUILT else 0) or (step == 0 and function is fast), calls
            runs.append([y, leaf.grad])
        torch.testing.assert_close(*runs, rtol=1e-4, atol=1e-4)
    for (name, a), b in zip(model.named_parameters(), twin.parameters()):
        scale = max(1.0, a.grad.abs().max().item())  # that of a constant before a norm is 0, but for rounding
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4 * scale, msg=name)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(twin.state_dict()[name], value, msg=name)


@pytest.mark.skipif(not hasattr(torch.export, 'Dim'), reason='torch.export has no Dim before torch 2.2')
@pytest.mark.parametrize('strict', [True, False])
def test_torch_export_has_torchs_own_operators_only(strict):
    model = small_model().eval()
    x = torch.randn(2, 3, 9, 10)
    program = torch.export.export(model, (x,), strict=strict)
    targets = [str(node.target) for node in program.graph.nodes if node.op == 'call_function']
    assert targets and all(target.startswith('aten.') for target in targets), targets
    torch.testing.assert_close(program.module()(x), model(x))


@pytest.mark.parametrize('how', ['fx', 'jit'])
def test_tracers_see_torchs_own_operators_only(how):
    model = small_model().eval()
    x, other = torch.randn(2, 3, 9, 10), torch.randn(3, 3, 8, 11)
    model = model[:4] if how == 'fx' else model  # SyncBatchNorm looks at the shape of its input
    traced = torch.fx.symbolic_trace(model) if how == 'fx' else torch.jit.trace(model, x)
    with Calls() as calls:
        got = [traced(x), traced(other)]
    assert calls.names == []
    torch.testing.assert_close(got, [model(x), model(other)])


def test_torch_func():
    """torch.func.grad and vmap see torch's own operators, and agree with a loop over autograd."""
    layer = BNET(3, k=3).eval()
    for tensor in layer.state_dict().values():
        if tensor.is_floating_point():
            torch.nn.init.uniform_(tensor, 0.5, 2)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}
    x = torch.randn(4, 1, 3, 6, 5)

    def loss(parameters, x):
        return torch.func.functional_call(layer, parameters, (x,)).square().sum()

    grads = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for i in range(4):
        expected = torch.autograd.grad(layer(x[i]).square().sum(), layer.parameters())
        for name, grad in zip(parameters, expected, strict=True):
            torch.testing.assert_close(grads[name][i], grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('use_reentrant', [True, False])
def test_activation_checkpointing(use_reentrant):
    """Gradients are the same to the bit; statistics are updated once more, as those of BatchNorm2d are."""
    bn = reference.randomise(nn.BatchNorm2d(4))
    x, counts = torch.randn(2, 3, 8, 9), []
    for norm in (bn, BNET.from_norm(bn, 3)):
        norm.momentum = 0.1
        body = nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.ReLU())
        results = []
        for recompute in (False, True):
            twin, leaf = copy.deepcopy(body), x.clone().requires_grad_()
            y = checkpoint(twin, leaf, use_reentrant=use_reentrant) if recompute else twin(leaf)
            y.square().sum().backward()
            results.append([y.detach(), leaf.grad, *(p.grad for p in twin.parameters())])
        assert all(torch.equal(a, b) for a, b in zip(*results))
        layer = twin[1].norm if isinstance(twin[1], BNET) else twin[1]
        counts.append([layer.num_batches_tracked.item(), layer.running_mean.norm() > 0])
    assert counts[0] == counts[1] == [2, True]
