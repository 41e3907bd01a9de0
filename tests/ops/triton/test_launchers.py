"""What the launchers make of arguments and of the kernels' partial results; see test_kernels.py."""

import itertools

import pytest
import torch

from bnet_mm.ops.bnet import bnet, moments
from bnet_mm.ops.triton import launchers, plans
from helpers.triton_cases import (
    DEVICE,
    LAYOUTS,
    Case,
    assert_as_good,
    check,
    check_moments,
    independent,
    needs_gpu,
    runs_kernels,
    two_operators,
)


@runs_kernels
def test_many_programs(monkeypatch):
    """Programs of several samples and strips: what large tensors have, at a small size."""
    for programs, layout in itertools.product((1, 2, 10**6), LAYOUTS):
        monkeypatch.setattr(plans, 'PROGRAMS', programs)
        monkeypatch.setattr(plans, 'LANES', 128 * programs)
        forget_plans()
        check(Case((3, 2, 11, 5), layout=layout))
        check_moments(torch.randn(5, 3, 9, 60).contiguous(memory_format=layout))
    forget_plans()


def forget_plans():
    for function in vars(launchers).values():
        if hasattr(function, 'cache_clear'):
            function.cache_clear()


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
