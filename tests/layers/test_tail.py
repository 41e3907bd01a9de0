"""BNET with what follows it in a residual block: ``relu(BNET(x) + residual)``."""

import copy

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from bnet_mm import BNET
from bnet_mm.layers.bnet import DepthwiseTransform
from helpers import reference
from helpers.kernels import DOUBLE, Calls, compiled
from helpers.kinds import KINDS, maps

BACKENDS = ['reference', pytest.param('auto', marks=compiled)]
BNETS = [name for name in KINDS if name.startswith('BNET') and name != 'BNET over CBN']
CHANNELS_LAST = torch.channels_last


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    monkeypatch.setenv('BNET_MM_BACKEND', request.param)
    return request.param


def one_after_the_other(layer, x, residual, relu):
    y = layer(x)
    y = y if residual is None else y + residual
    return y.relu() if relu else y


def in_one_call(layer, x, residual, relu):
    return layer(x, residual, relu=relu)


def learn(function, layer, x, residual, relu):
    """Output, gradients of map, residual and parameters, and what the layer remembers."""
    layer = copy.deepcopy(layer)
    leaves = [x.detach().requires_grad_(), None if residual is None else residual.detach().requires_grad_()]
    y = function(layer, *leaves, relu)
    wanted = [t for t in (*leaves, *layer.parameters()) if t is not None]
    grads = torch.autograd.grad((y * y.detach().flip(0).cos()).sum(), wanted)
    return [y.detach(), *grads, *layer.state_dict().values()]


@pytest.mark.parametrize('channels_last', [False, True])
@pytest.mark.parametrize('name', BNETS)
@pytest.mark.parametrize('mode', ['training', 'norm_eval', 'evaluation'])
def test_equals_one_after_the_other(backend, name, mode, channels_last):
    layer = reference.randomise(KINDS[name]()).double().train(mode != 'evaluation')
    if mode == 'norm_eval':
        layer.norm.eval()
    x, residual = maps().double(), torch.randn(3, 4, 5, 7, **DOUBLE)
    if channels_last:
        x, residual = (t.contiguous(memory_format=CHANNELS_LAST) for t in (x, residual))
    for relu in (False, True):
        for added in (None, residual):
            want = learn(one_after_the_other, layer, x, added, relu)
            got = learn(in_one_call, layer, x, added, relu)
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
            assert got[0].stride() == want[0].stride()


@pytest.mark.parametrize('k', [1, 3, 5, 7])
@pytest.mark.parametrize('training', [True, False])
def test_equals_the_formula(backend, k, training):
    """Batch statistics and running ones; the gradients are those of the formula in torch's own operators."""
    layer = reference.randomise(BNET(5, k)).double().train(training)
    x, residual, grad = (torch.randn(3, 5, 6, 11, **DOUBLE) for _ in range(3))
    x += 1
    leaves = [x.requires_grad_(), residual.requires_grad_(), layer.bnconv.weight, layer.bnconv.bias]
    mean, var = reference.batch_statistics(x) if training else (layer.norm.running_mean, layer.norm.running_var)
    want = (reference.bnet(x, *leaves[2:], mean, var, layer.norm.eps) + residual).clamp(min=0)
    assert 0.02 < (want == 0).double().mean() < 0.98
    want_grads = torch.autograd.grad(want, leaves, grad)
    got = layer(x, residual, relu=True)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(torch.autograd.grad(got, leaves, grad), want_grads, rtol=1e-9, atol=1e-9)


@compiled
def test_runs_in_one_pass():
    layer, (x, residual) = BNET(4, 3).eval(), (maps(), maps())
    for relu in (True, False):
        with Calls() as calls, torch.profiler.profile() as profile:
            layer(x, residual, relu=relu)
        assert calls.names == ['norm']
    assert not {'aten::add_', 'aten::relu', 'aten::clamp_min'} & {event.key for event in profile.key_averages()}


def odd_residuals():
    x = maps()
    return {
        'another dtype': (x, maps().double()), 'wider than the map': (x.bfloat16(), maps()),
        'another layout': (x, maps().contiguous(memory_format=CHANNELS_LAST)),
        'other strides': (x, maps(3, 4, 10, 14)[:, :, ::2, 1::2]), 'broadcast': (x, maps(1, 4, 1, 7)),
        'broadcasting': (maps(1, 4, 5, 7), x), 'expanded': (x, maps(3, 4, 5, 1).expand(x.shape)),
        'a number': (x, torch.tensor(0.5)), 'the map itself': (x, x), 'a part of the map': (x, x[:, :1]),
    }  # fmt: skip


@pytest.mark.parametrize('name', odd_residuals())
def test_any_residual_that_torch_adds(backend, name):
    x, residual = odd_residuals()[name]
    layer = reference.randomise(BNET(4, 3)).eval()
    before = x.clone(), residual.clone()
    want, got = (f(layer, x, residual, True) for f in (one_after_the_other, in_one_call))
    assert (got.dtype, got.stride()) == (want.dtype, want.stride())
    precision = 2e-2 if x.dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(got, want, rtol=precision, atol=precision)
    torch.testing.assert_close((x, residual), before, rtol=0, atol=0)


def test_the_map_itself_gets_both_gradients(backend):
    layer = reference.randomise(BNET(4, 3)).double()
    x = maps().double().requires_grad_()
    want, got = (
        torch.autograd.grad(f(copy.deepcopy(layer), x, x, True).square().sum(), x)[0]
        for f in (one_after_the_other, in_one_call)
    )
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('residual_dtype', [torch.float32, torch.bfloat16])
def test_autocast(backend, dtype, residual_dtype):
    layer = reference.randomise(BNET(4, 3))
    x, residual = maps().to(dtype), maps().to(residual_dtype)
    with torch.autocast('cpu', torch.bfloat16):
        want, got = (f(copy.deepcopy(layer), x, residual, True) for f in (one_after_the_other, in_one_call))
    assert got.dtype == want.dtype == residual_dtype  # the layer's own output is bfloat16
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize('where', ['map', 'residual', 'gradient'])
def test_not_a_number(backend, where):
    """Comes out where it comes out of torch's operators, and its pixel's gradient passes the ReLU as there."""
    layer = reference.randomise(BNET(4, 3)).eval()
    x, residual, grad = maps(), maps(), maps()
    dict(map=x, residual=residual, gradient=grad)[where][1, 2, 3, 4] = float('nan')
    results = []
    for function in (one_after_the_other, in_one_call):
        leaves = [x.clone().requires_grad_(), residual.clone().requires_grad_()]
        y = function(layer, *leaves, True)
        results.append([y.detach(), *torch.autograd.grad(y, leaves, grad)])
    torch.testing.assert_close(results[1], results[0], equal_nan=True, rtol=1e-5, atol=1e-5)
    assert results[0][2].isnan().any() == (where == 'gradient') and any(t.isnan().any() for t in results[0])


@pytest.mark.parametrize('part', ['norm', 'bnconv'])
def test_hooks_see_what_the_parts_compute(backend, part):
    layer = reference.randomise(BNET(4, 3)).eval()
    seen = []
    layer.get_submodule(part).register_forward_hook(lambda module, inputs, output: seen.append(output.clone()))
    x, residual = maps(), maps()
    want, got = (f(layer, x, residual, True) for f in (one_after_the_other, in_one_call))
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(seen[1], seen[0])
    assert len(seen) == 2 and (seen[1] < 0).any()


def test_what_torch_cannot_run_in_one_pass(backend):
    """Other kernels, second derivatives, traced and symbolic graphs."""
    x, residual = maps(), maps()
    wide = reference.randomise(BNET(4, 3, dilation=2)).eval()
    torch.testing.assert_close(wide(x, residual, relu=True), one_after_the_other(wide, x, residual, True))
    layer = reference.randomise(BNET(4, 3)).eval()
    want = one_after_the_other(layer, x, residual, True)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = layer

        def forward(self, x, residual):
            return self.bn(x, residual, relu=True)

    for graph in (torch.jit.trace(Block(), (x, residual)), torch.fx.symbolic_trace(Block())):
        torch.testing.assert_close(graph(x, residual), want)
    inputs = [t[:1, :, :3, :2].double().requires_grad_() for t in (x, residual)]
    assert torch.autograd.gradgradcheck(lambda *t: layer.double()(*t, relu=True), inputs)


@pytest.mark.parametrize('relu', [False, True])
def test_transform_alone(backend, relu):
    """What folding leaves of a layer takes the same arguments."""
    transform = reference.randomise(DepthwiseTransform(4, 5, 1)).double()
    x, residual = maps().double(), maps().double()
    for added in (None, residual):
        want = reference.depthwise(x, transform.weight, transform.bias) + (0 if added is None else added)
        torch.testing.assert_close(transform(x, added, relu), want.clamp(min=0) if relu else want)


class Makers(TorchDispatchMode):
    """Names of all operators that gave new tensors."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **kwargs or {})
        if not function.is_view and any(isinstance(value, torch.Tensor) for value in pytree.tree_leaves(found)):
            self.names.append(str(function))
        return found


@compiled
@pytest.mark.parametrize('k', [1, 3, 5, 7])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_transform_alone_makes_no_tensor_but_its_output(k, dtype):
    """A folded layer runs one operator: no zeros and ones for a normalisation that is not there."""
    transform = reference.randomise(DepthwiseTransform(4, k, 1)).eval()
    x, residual = maps().to(dtype), maps().to(dtype)
    for options in ((), (residual, True)):
        with Makers() as makers, torch.no_grad():
            y = transform(x, *options)
        assert makers.names == ['bnet_mm.norm.default']
        want = reference.depthwise(x.double(), transform.weight.double(), transform.bias.double())
        want = (want + residual.double()).clamp(min=0) if options else want
        precision = 2e-2 if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(y.double(), want, rtol=precision, atol=precision)
    assert set(transform.state_dict()) == {'weight', 'bias'}


@compiled
def test_transform_alone_in_half_precision():
    """Parameters of the map's dtype are widened; autograd gives them gradients of theirs."""
    transform = reference.randomise(DepthwiseTransform(4, 3, 1)).bfloat16()
    x = maps().bfloat16().requires_grad_()
    leaves = [x, transform.weight, transform.bias]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    got = torch.autograd.grad(transform(x).square().sum(), leaves)
    want = torch.autograd.grad(reference.depthwise(*exact).square().sum(), exact)
    for one, two in zip(got, want):
        assert one.dtype == torch.bfloat16
        torch.testing.assert_close(one.double(), two, rtol=3e-2, atol=3e-2 * two.abs().max().item())
