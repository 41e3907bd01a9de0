"""What only a GPU's runtime can break: graphs, streams, devices, processes; and autocast and torch.compile."""

import copy

import pytest
import torch
from torch import nn

import bnet_mm.host.compat  # noqa: F401  (mends torchvision where its operators are missing)
from bnet_mm import BNET, enhance
from helpers.gpu import DEVICE, exact, needs_gpu, random_layer, random_map, run

TWO = pytest.mark.skipif(torch.cuda.device_count() < 2, reason='needs two CUDA devices')


@needs_gpu
@pytest.mark.parametrize('training', [True, False])
def test_graph_of_a_step(training):
    """A captured forward and backward pass, replayed on new values, gives what the calls give."""
    layer = random_layer(16, 5, training)
    twin = copy.deepcopy(layer)
    static = random_map((4, 16, 20, 28)).requires_grad_()
    inputs = [static, *layer.parameters()]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):  # warm-up, as torch wants it
        for _ in range(3):
            torch.autograd.grad(layer(static).square().sum(), inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(static)
        gradients = torch.autograd.grad(y.square().sum(), inputs)
    layer.load_state_dict(twin.state_dict())
    for _ in range(2):
        x = random_map((4, 16, 20, 28)).requires_grad_()
        static.data.copy_(x)
        graph.replay()
        expected = twin(x)
        assert torch.equal(y, expected)
        for one, other in zip(gradients, torch.autograd.grad(expected.square().sum(), [x, *twin.parameters()])):
            assert torch.equal(one, other)
    for name, value in twin.norm.named_buffers():
        assert torch.equal(value, layer.norm.get_buffer(name)), name


@needs_gpu
def test_two_streams():
    """Layers that run on two streams at once do not share anything."""
    layers = [random_layer(32, 3) for _ in range(2)]
    maps = [(random_map((8, 32, 56, 56)), random_map((8, 32, 56, 56))) for _ in range(2)]
    alone = [run(copy.deepcopy(layer), *pair) for layer, pair in zip(layers, maps)]
    streams, together = [torch.cuda.Stream() for _ in range(2)], []
    torch.cuda.synchronize()
    for layer, pair, stream in zip(layers, maps, streams):
        with torch.cuda.stream(stream):
            together.append(run(layer, *pair))
    for one, other in zip(together, alone):
        one.assert_equal(other)


@needs_gpu
@TWO
def test_device_that_is_not_current():
    layer, x, grad = random_layer(8, 3), random_map((2, 8, 9, 13)), random_map((2, 8, 9, 13))
    expected = run(copy.deepcopy(layer), x, grad)
    with torch.cuda.device(0):
        run(layer.to('cuda:1'), x.to('cuda:1'), grad.to('cuda:1')).assert_equal(expected)


@needs_gpu
@pytest.mark.parametrize('momentum', [0.1, None])
def test_nothing_waits(momentum):
    """No step copies a number from the device, which would wait for all that runs there."""
    layer, x = random_layer(4, 3), random_map((2, 4, 6, 8)).requires_grad_()
    layer.norm.momentum = momentum
    layer(x).sum().backward()  # compiles, which may wait
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode('error')
    try:
        layer(x).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode(mode)


@needs_gpu
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_autocast(dtype):
    """A convolution and a BNET under autocast: float16 goes in and out, parameters and their gradients stay float32."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3), BNET(8, k=3)).cuda()
    x = random_map((4, 3, 20, 30))
    with torch.autocast('cuda', dtype):
        y = net(x)
    y.float().square().mean().backward()
    assert y.dtype == dtype
    truth = exact(net[1], net[0](x).detach(), torch.zeros_like(y, dtype=torch.float32)).values['y']
    assert (y.double().cpu() - truth).abs().max() < 0.05 * truth.abs().max()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in net.parameters())


@needs_gpu
def test_compiled_with_changing_sizes():
    """torch.compile of a training layer, for four sizes: the values of the layer as it is, and few compilations."""
    layer = random_layer(8, 3)
    twin = copy.deepcopy(layer)
    compiled = torch.compile(layer, dynamic=True)
    for shape in ((2, 8, 12, 16), (3, 8, 20, 14), (2, 8, 33, 7), (5, 8, 8, 64)):
        x, grad = random_map(shape).requires_grad_(), random_map(shape)
        for net in (compiled, twin):
            net.zero_grad()
            net(x).backward(grad)
        for (name, one), other in zip(layer.named_parameters(), twin.parameters()):
            assert (one.grad - other.grad).abs().max() <= 1e-5 * other.grad.abs().max(), name


def synchronised(rank, number, store):
    """One of ``number`` processes with a device each: SyncBN inside of BNET equals one process with all samples."""
    import torch.distributed as dist

    torch.cuda.set_device(rank)
    dist.init_process_group('nccl', init_method=f'file://{store}', rank=rank, world_size=number)
    torch.manual_seed(0)
    layer = BNET(6, k=3, norm='SyncBN').cuda()
    whole, plain = torch.randn(2 * number, 6, 9, 7).cuda(), BNET(6, k=3).cuda()
    plain.bnconv.load_state_dict(layer.bnconv.state_dict())
    y = layer(whole[2 * rank : 2 * rank + 2])
    assert (y - plain(whole)[2 * rank : 2 * rank + 2]).abs().max() < 1e-5
    assert (layer.norm.running_var - plain.norm.running_var).abs().max() < 1e-5
    dist.destroy_process_group()


@needs_gpu
@pytest.mark.parametrize('number', [1, pytest.param(2, marks=TWO)])
def test_nccl(number, tmp_path):
    torch.multiprocessing.spawn(synchronised, (number, tmp_path / 'store'), nprocs=number)


def test_network():
    """torchvision's ResNet with BNET where the paper has it: the kernels against torch's own operators."""
    models = pytest.importorskip('torchvision.models', reason='torchvision is not installed')
    net = models.resnet50(width_per_group=64) if DEVICE == 'cuda' else models.resnet18()
    size = 224 if DEVICE == 'cuda' else 32
    enhance(net, k=3, where='C')
    net = net.to(DEVICE).eval()  # a batch of two would make its gradients a matter of rounding
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if 'bnconv.weight' in name:
                parameter += 0.1 * torch.randn_like(parameter)
    x, label = torch.randn(2, 3, size, size, device=DEVICE), torch.tensor([1, 5], device=DEVICE)
    found = {}
    for backend in ('triton', 'reference'):
        twin = copy.deepcopy(net)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv('BNET_MM_BACKEND', backend)
            loss = nn.functional.cross_entropy(twin(x), label)
            loss.backward()
        found[backend] = (loss, *(p.grad for p in twin.parameters()), *twin.buffers())
    for one, other in zip(found['triton'], found['reference']):
        assert (one - other).abs().max() <= 2e-3 * (other.abs().max() + 1e-6)
