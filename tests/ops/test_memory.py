"""The memory of large maps is used again, and no kernel reads outside of its input."""

import copy
import sys

import pytest
import torch

from bnet_mm import BNET
from helpers.kernels import BUILT, compiled
from helpers.tools import python

HELD = torch.ops.bnet_mm.cpu_memory_held if BUILT else None
MIB = 2**20


def large_map(height, fill):
    """(1, 16, height, 512) in float32: height / 32 MiB. Every value of the result is ``fill``."""
    x = torch.full((1, 16, height, 512), float(fill))
    return torch.ops.bnet_mm.forward(x, *torch.tensor([[0.0], [1.0]]).expand(2, 16), torch.ones(16, 1, 1, 1),
                                     torch.zeros(16), None, False)  # fmt: skip


@compiled
def test_large_maps_share_no_memory():
    maps = [large_map(1100, fill) for fill in range(3)]
    del maps[1]
    assert HELD() >= 34 * MIB
    maps += [large_map(height, height) for height in (1100, 1060, 1100)]
    view = maps.pop(0)[0, 3, 5:, 7]  # keeps the whole memory alive
    maps += [large_map(1100, 7) for _ in range(2)]
    assert len({y.untyped_storage().data_ptr() for y in [view, *maps]}) == len(maps) + 1
    assert all((y == fill).all() for y, fill in zip([view, *maps], (0, 2, 1100, 1060, 1100, 7, 7), strict=True))


@compiled
def test_memory_held_is_used_again_and_bounded():
    maps = [large_map(1100, 1) for _ in range(9)]
    del maps
    held = HELD()
    assert 200 * MIB < held <= 256 * MIB  # not all nine
    y = large_map(1100, 2)
    assert HELD() == held - y.nbytes
    z = large_map(2048, 3)  # larger than all that is held
    assert HELD() == held - y.nbytes
    small = large_map(128, 4)  # 4 MiB: malloc's
    assert HELD() == held - y.nbytes
    assert (y == 2).all() and (z == 3).all() and (small == 4).all()
    del y, z, small
    held = HELD()
    assert 64 * MIB < held <= 256 * MIB
    big = large_map(9000, 5)
    del big  # larger than the bound: it goes, the others stay
    assert HELD() == held


@compiled
def test_maps_above_4_mib_are_held():
    held = HELD()
    y = large_map(129, 1)
    size = y.nbytes
    del y
    assert HELD() == held + size or held + size > 256 * MIB
    y = large_map(129, 2)
    assert HELD() <= held and (y == 2).all()


@compiled
def test_large_map_behaves_as_any_tensor(monkeypatch):
    y = large_map(1100, 1)
    assert y.is_contiguous() and y.storage_offset() == 0 and y.untyped_storage().nbytes() == y.nbytes
    y += 1
    z = y.clone()
    y.share_memory_()
    assert torch.equal(y, z) and y.is_shared()
    x = torch.randn(1, 16, 1100, 512).to(memory_format=torch.channels_last).requires_grad_()
    layer = BNET(16, k=3)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    inputs = [x, *layer.parameters()]
    y = layer(x)
    assert y.nbytes > 32 * MIB and y.is_contiguous(memory_format=torch.channels_last)
    got = torch.autograd.grad(y, inputs, y.detach() / 1000)
    monkeypatch.setenv('BNET_MM_BACKEND', 'reference')
    exact = copy.deepcopy(layer).double()
    inputs = [x.detach().double().requires_grad_(), *exact.parameters()]
    expected = exact(inputs[0])
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-4)
    wanted = torch.autograd.grad(expected, inputs, y.detach().double() / 1000)
    torch.testing.assert_close([g.double() for g in got], list(wanted), rtol=1e-3, atol=1e-3)


GUARDED = """
import ctypes, itertools, mmap, torch
from helpers import kernels
libc, page = ctypes.CDLL(None), mmap.PAGESIZE
libc.mmap.restype, pointer, size_t = ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t
libc.mmap.argtypes = [pointer, size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, size_t]
libc.mprotect.argtypes, libc.munmap.argtypes = [pointer, size_t, ctypes.c_int], [pointer, size_t]
mapped = []

def guarded(tensor, at_end):
    size = tensor.numel() * tensor.element_size()
    pages = -(-size // page)
    base = libc.mmap(None, (pages + 2) * page, 3, 0x22, -1, 0)  # read and write; private, anonymous
    mapped.append((base, (pages + 2) * page))
    for forbidden in (base, base + (pages + 1) * page):
        assert libc.mprotect(forbidden, page, 0) == 0
    start = base + page + (pages * page - size if at_end else 0)
    memory = (ctypes.c_char * size).from_address(start)
    return torch.frombuffer(memory, dtype=tensor.dtype).as_strided(tensor.shape, tensor.stride()).copy_(tensor)

ops, names = torch.ops.bnet_mm, kernels.NAMES
if {overrun}:  # a map of two pages, of which one may be touched
    memory = (ctypes.c_char * (2 * page)).from_address(guarded(torch.ones(page // 4), True).data_ptr())
    x = torch.frombuffer(memory, dtype=torch.float32).view(1, 2, -1, 32)
    ops.forward(x, torch.zeros(2), torch.ones(2), torch.ones(2, 1, 3, 3), torch.zeros(2), None, False)
    raise SystemExit(1)
for i, (k, dtype, channels_last) in enumerate(itertools.product((1, 3, 5, 7), kernels.DTYPES, (0, 1))):
    for j, shape in enumerate(kernels.SHAPES[i % 2 :: 2]):
        for at_end in (True, False):
            values = kernels.make_inputs(shape, k, kernels.DTYPES[dtype], j % 3 == 0, bool(channels_last), j % 2 == 0)
            x, mean, rstd, weight, bias, residual = (
                None if values[name] is None else guarded(values[name], at_end) for name in names
            )
            y = guarded(ops.forward(x, mean, rstd, weight, bias, residual, True), at_end)
            grad_x = guarded(ops.backward(y, x, mean, rstd, weight, True, True)[0], at_end)
            ops.moments(x, j % 2 == 0)
            ops.moments_backward(grad_x, x, mean, rstd, rstd)
            del x, mean, rstd, weight, bias, residual, y, grad_x
            while mapped:
                assert libc.munmap(*mapped.pop()) == 0
"""


@compiled
@pytest.mark.skipif(sys.platform != 'linux', reason='needs mmap of Linux')
def test_no_kernel_reads_outside_its_input():
    """Every input lies between two pages that nobody may touch, at the end or at the start of its own memory.

    AddressSanitizer does not see AVX-512's masked loads; this does. A deliberate overrun shows that it does.
    """
    for overrun in (False, True):
        done = python(GUARDED.format(overrun=overrun))
        assert done.returncode == (-11 if overrun else 0), done.stderr
