"""Faults that users of such layers report: memory that cannot be resized, work that counters miss, processors."""

import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from bnet_mm import BNET
from bnet_mm.ops.dispatch import load_backend

BUILT, WHY = load_backend('cpp')
compiled = pytest.mark.skipif(not BUILT, reason=f'no C++ extension: {WHY}')
MIB = 2**20


def large_map(fill=0.0, dtype=torch.float32):
    """(1, 16, 1100, 512) from the kernels: more than 32 MiB in float32."""
    x = torch.full((1, 16, 1100, 512), fill, dtype=dtype)
    numbers = torch.tensor([[0.0], [1.0]]).expand(2, 16)
    return torch.ops.bnet_mm.forward(x, *numbers, torch.ones(16, 1, 1, 1), torch.zeros(16), None, False)


# --- Large maps are tensors as any other


@compiled
def test_large_map_can_be_resized():
    y, plain = large_map(2.0), torch.full((1, 16, 1100, 512), 2.0)
    for tensor in (y, plain):
        tensor.resize_(1, 16, 1200, 512)
        assert tensor.shape == (1, 16, 1200, 512) and tensor.untyped_storage().nbytes() == tensor.nbytes
        assert (tensor.flatten()[: 16 * 1100 * 512] == 2).all()
        tensor.fill_(3)
        tensor.resize_(4)
        assert (tensor == 3).all()


@compiled
def test_memory_of_a_large_map_can_be_given_back_and_taken_again():
    """As FSDP and offloading do."""
    y = large_map(2.0)
    storage, size = y.untyped_storage(), y.nbytes
    resizable = storage.resizable()
    assert resizable  # pytest would print all of the storage
    held = torch.ops.bnet_mm.cpu_memory_held()
    storage.resize_(0)
    assert storage.nbytes() == 0 and torch.ops.bnet_mm.cpu_memory_held() == held + size  # for the next map
    storage.resize_(size)
    assert storage.nbytes() == size and torch.ops.bnet_mm.cpu_memory_held() == held  # the same block
    assert (y.fill_(5) == 5).all()


@compiled
def test_large_map_takes_results():
    y = large_map()
    x = torch.randn(1, 16, 1100, 512)
    torch.add(x, 1, out=y)
    assert torch.equal(y, x + 1)
    small = torch.randn(3, 5)
    assert torch.equal(torch.add(small, small, out=large_map().resize_(0)), small * 2)
    larger = torch.randn(1, 16, 1300, 512)
    assert torch.equal(torch.mul(larger, 2, out=large_map().resize_(0)), larger * 2)


@compiled
def test_large_map_copies_and_moves_as_any_tensor(tmp_path):
    y = large_map(3.0)
    torch.save(y, tmp_path / 'map.pth')
    loaded = torch.load(tmp_path / 'map.pth')
    for twin in (y.clone(), loaded, y.detach().share_memory_()):
        assert (twin == 3).all()
    y.data = torch.zeros(3)
    assert y.untyped_storage().nbytes() == 12


@compiled
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize('channels_last', [False, True])
def test_gradients_of_large_maps_are_resizable_and_reuse_memory(channels_last, dtype):
    layer = BNET(16, 3)
    x = torch.randn(2, 16, 1100, 512).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    leaf = x.requires_grad_()
    y = layer(leaf)
    (grad,) = torch.autograd.grad(y, leaf, torch.ones_like(y))
    assert grad.stride() == y.stride() == x.stride() and grad.dtype == y.dtype == dtype
    resizable = [tensor.untyped_storage().resizable() for tensor in (grad, y)]
    assert all(resizable)
    del grad, y
    assert torch.ops.bnet_mm.cpu_memory_held() >= 64 * MIB


# --- Counters of operations


def flops(module, x, backend, monkeypatch):
    """Of the forward and of the backward pass."""
    monkeypatch.setenv('BNET_MM_BACKEND', backend)
    with FlopCounterMode(display=False) as counter:
        y = module(x)
        forward = counter.get_total_flops()
        y.sum().backward()
    return forward, counter.get_total_flops() - forward


@compiled
@pytest.mark.parametrize('norm', ['BN', 'SyncBN', dict(type='GN', num_groups=2), 'IN', 'SN', 'SyncSN'], ids=str)
@pytest.mark.parametrize('k', [1, 3, 5, 7])
def test_operations_are_counted_as_those_of_a_depthwise_convolution(k, norm, monkeypatch):
    layer = BNET(4, k, norm=norm)
    convolution = nn.Conv2d(4, 4, k, padding=k // 2, groups=4)
    for training in (True, False):
        layer.train(training)
        for trains in (True, False):
            layer.bnconv.requires_grad_(trains)
            convolution.requires_grad_(trains)
            x = torch.randn(2, 4, 9, 8, requires_grad=True)
            want = flops(convolution, x, 'reference', monkeypatch)
            assert want[0] == 2 * k * k * x.numel() and want[1] >= want[0]
            assert flops(layer, x, 'cpp', monkeypatch) == flops(layer, x, 'reference', monkeypatch) == want


@compiled
def test_operations_are_found_under_their_module(monkeypatch):
    monkeypatch.setenv('BNET_MM_BACKEND', 'cpp')
    model = nn.Sequential(nn.Conv2d(3, 4, 3), BNET(4, 3))
    with FlopCounterMode(display=False) as counter:
        model(torch.randn(1, 3, 8, 8))
    assert sum(counter.get_flop_counts()['Sequential.1'].values()) == 2 * 9 * 4 * 6 * 6


def test_mmengines_counter_sees_the_convolution(monkeypatch):
    """It traces the model, which runs torch's own operators; multiplications with additions count once there."""
    analysis = pytest.importorskip('mmengine.analysis')
    found = []
    for backend in ('auto', 'reference'):
        monkeypatch.setenv('BNET_MM_BACKEND', backend)
        counter = analysis.FlopAnalyzer(BNET(4, 3).eval(), (torch.randn(1, 4, 9, 8),))
        found.append(dict(counter.by_operator()))
    assert found[0] == found[1] and found[0]['conv'] == 9 * 4 * 9 * 8


# --- The processor


@compiled
@pytest.mark.parametrize('wanted, avx2, avx512, chosen', [
    ('AVX512', True, True, 'AVX-512'), ('AVX512', True, False, 'AVX2'), ('AVX512', False, False, 'generic'),
    ('AVX2', True, True, 'AVX2'), ('AVX2', True, False, 'AVX2'), ('AVX2', False, False, 'generic'),
    ('DEFAULT', True, True, 'generic'), ('DEFAULT', False, False, 'generic'), ('NO AVX', True, False, 'generic'),
])  # fmt: skip
def test_no_instruction_set_that_the_processor_lacks(wanted, avx2, avx512, chosen):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        assert torch.ops.bnet_mm.cpu_instruction_set_for(wanted, avx2, avx512) == chosen


@compiled
def test_the_instruction_set_is_one_of_the_processors():
    try:
        text = Path('/proc/cpuinfo').read_text()
    except OSError:
        pytest.skip('no /proc/cpuinfo')
    flags = set(next(line for line in text.splitlines() if line.startswith('flags')).split())
    needs = {'AVX-512': {'avx512f', 'avx512bw', 'avx512dq', 'avx512vl', 'avx2', 'fma'}, 'AVX2': {'avx2', 'fma'}}
    assert needs.get(torch.ops.bnet_mm.cpu_instruction_set(), set()) <= flags
