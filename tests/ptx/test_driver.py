"""The GPU that the package sees: ordinary calls, launches past Triton's JIT, streams, devices; nothing stays behind."""

import contextlib

import pytest
import torch

pytest.importorskip('triton', reason='Triton is not installed')
import triton  # noqa: E402
import triton.language as tl  # noqa: E402

from bnet_mm import BNET  # noqa: E402
from bnet_mm.ops import dispatch  # noqa: E402
from bnet_mm.ops.triton import launch, launchers  # noqa: E402
from ptx.cases import Case, run  # noqa: E402
from ptx.driver import machine  # noqa: E402
from ptx.faults import Fault  # noqa: E402


@triton.jit
def twice(x, y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i, mask=i < n) * 2, mask=i < n)


def test_ordinary_calls_run_on_it():
    layer, x = BNET(3), torch.randn(2, 3, 5, 6, requires_grad=True)
    with machine() as gpu:
        assert dispatch.select_backend(x, 3) == 'triton'
        y = layer(x)
        torch.autograd.grad(y.sum(), (x, *layer.parameters()))
    assert [done.kernel.removesuffix('_kernel') for done in gpu.launches] == [
        'moments', 'batch_statistics', 'forward', 'backward', 'add_partials', 'backward',
    ]  # fmt: skip


def test_nothing_is_left_behind():
    layer, x = BNET(3), torch.randn(2, 3, 5, 6)
    before, backends = layer(x), dict(dispatch.BACKENDS)
    chosen = dispatch.select_backend(x, 3)
    with machine() as gpu:
        layer(x)
        count = len(gpu.launches)
    assert dispatch.BACKENDS == backends and dispatch.select_backend(x, 3) == chosen
    assert torch.equal(BNET(3)(x), before) and len(gpu.launches) == count
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize('by_address', (False, True))
def test_a_launch_past_the_jit(by_address):
    """The compiled kernel launched by itself, as a cache of launches would, on tensors or on their addresses."""
    x, y = torch.randn(300), torch.empty(300)
    without_memory = torch.eye(3).to_sparse()  # as another test may leave one: no address is in it
    with machine() as gpu:
        compiled = twice[(3,)](x, y, 300, 128)
        for tensor in (x, y):
            tensor.add_(1)
        arguments = [tensor.data_ptr() if by_address else tensor for tensor in (x, y)]
        compiled.run(3, 1, 1, 0, compiled.function, compiled.packed_metadata, None, None, None, *arguments, 300, 128)
        assert torch.equal(y, x * 2) and len(gpu.launches) == 2
        compiled[(3, 1, 1)](*arguments, 300, 128)
        assert len(gpu.launches) == 3
        with pytest.raises(Fault, match='the address of no tensor'):
            compiled[(3, 1, 1)](x.data_ptr(), 64, 300, 128)
    assert without_memory.is_sparse


def test_streams():
    with machine() as gpu:
        for gpu.stream in (0, 7):
            twice[(1,)](torch.randn(9), torch.empty(9), 9, 128)
    assert [done.stream for done in gpu.launches] == [0, 7]


def test_every_launch_is_guarded(monkeypatch):
    """Each launch lies within the guard of its tensors' device, where that is not the current one."""
    guards, inside = [], []

    @contextlib.contextmanager
    def guard(index):
        guards.append(index)
        yield
        guards.pop()

    with machine() as gpu:
        execute = gpu.execute
        monkeypatch.setattr(gpu, 'execute', lambda *args: (inside.append(list(guards)), execute(*args)))
        monkeypatch.setattr(launch, 'device_of', lambda tensor: gpu.capability if guards else 1)
        monkeypatch.setattr(torch.cuda, 'device', guard)
        case = Case((2, 3, 5, 6))
        run(case, case.inputs())
    assert inside == [[1]] * 6 and not guards


def test_launches_that_repeat_are_direct(monkeypatch):
    """Past the JIT, with the same bits; not where an address is another one than what was compiled takes."""
    case = Case((2, 3, 8, 8), statistics='given', wanted=('x', 'weight'))
    inputs = case.inputs()
    through_jit = []
    original = triton.JITFunction.run
    monkeypatch.setattr(
        triton.JITFunction,
        'run',
        lambda self, *args, **options: (through_jit.append(self), original(self, *args, **options))[1],
    )
    for function in vars(launchers).values():
        if hasattr(function, 'cache_clear'):
            function.cache_clear()
    with machine() as gpu:
        first = run(case, inputs)
        assert len(through_jit) == len(gpu.launches) == 3
        second = run(case, inputs)
        assert len(through_jit) == 3 and len(gpu.launches) == 6
        assert all(torch.equal(value, second[name]) for name, value in first.items())
        storage = torch.zeros(inputs['x'].numel() + 1)
        moved = storage[1:].view(case.shape).copy_(inputs['x'])
        run(case, {**inputs, 'x': moved})
        assert len(through_jit) == 5 and len(gpu.launches) == 9  # but the sums are added as before
    with machine(80):
        run(case, inputs)
    assert len(through_jit) == 8  # another device
