"""Barriers taken out of the package's kernels, one at a time: each is found, or shown to order nothing."""

import itertools
import re
from collections import defaultdict

import pytest
import torch

pytest.importorskip('triton', reason='Triton is not installed')
from ptx.cases import LAYOUTS, Case, run  # noqa: E402
from ptx.driver import machine  # noqa: E402
from ptx.faults import Fault  # noqa: E402
from ptx.shared_memory import SharedMemory  # noqa: E402

BARRIER = re.compile(r'bar\.sync\s+0;')
SHARED = re.compile(r'(?:ld|st)\.shared|ldmatrix|stmatrix')
NCHW, NHWC = LAYOUTS


def without_barrier(name: str, number: int):
    """A rewrite of PTX: the kernel ``name`` loses its barrier of that number."""

    def rewrite(ptx: str) -> str:
        if f'.entry {name}(' not in ptx:
            return ptx
        place = next(itertools.islice(BARRIER.finditer(ptx), number, None))
        return ptx[: place.start()] + ptx[place.end() :]

    return rewrite


def accesses(ptx: str) -> list[list[str]]:
    """What is done to shared memory before the first barrier, between two, and after the last, in the text's order."""
    return [SHARED.findall(part) for part in BARRIER.split(ptx.split('.section')[0])]


@pytest.fixture
def touched(monkeypatch):
    """Which warps have read or written a place of shared memory between two barriers: a plain second reckoning."""
    found = defaultdict(set)

    def record(self, i, address, lanes, size, original=SharedMemory._place):
        block, at = original(self, i, address, lanes, size)
        for program, warp, first in zip(block, self.launch.thread[lanes] // 32, at):
            for byte in range(first, first + size, self.granule):
                found[self, program, self.epoch[program], byte].add((warp, i.opcode == 'st'))
        return block, at

    monkeypatch.setattr(SharedMemory, '_place', record)
    return found


def is_contended(touched, name: str) -> bool:
    """Whether a warp of the kernel ``name`` has read a place that another one wrote."""
    own = [who for (memory, *_), who in touched.items() if memory.launch.code.kernel.name == name]
    return any(one != other for who in own for one, wrote in who if wrote for other, also in who if not also)


@pytest.mark.parametrize(
    'case',
    [
        Case((2, 40, 9, 136), k=1),
        Case((2, 40, 9, 13), k=1, layout=NHWC),
        pytest.param(Case((2, 40, 9, 13), torch.float16, k=3, layout=NHWC), marks=pytest.mark.ptx),
        pytest.param(Case((2, 20, 9, 13), torch.float32, k=3), marks=pytest.mark.ptx),
    ],
    ids=str,
)
def test_barriers_taken_out(case, touched):
    inputs = case.inputs()
    with machine() as gpu:
        right = run(case, inputs)
        kernels = {done.kernel: (done.compiled.asm['ptx'], done.threads) for done in gpu.launches}
        found, redundant = [], []
        for name, (ptx, threads) in kernels.items():
            around = accesses(ptx)
            for number in range(len(around) - 1):
                gpu.rewrite = without_barrier(name, number)
                touched.clear()
                try:
                    values = run(case, inputs)
                except Fault as fault:
                    assert fault.kind in (Fault.RACE, Fault.UNWRITTEN) and fault.kernel == name
                    found.append((name, number))
                else:
                    # Nothing before it in shared memory, or nothing after it: there is nothing to order.
                    orders_nothing = not any(around[: number + 1]) or not any(around[number + 1 :])
                    # Or two others enclose the same accesses.
                    orders_nothing |= not around[number] or not around[number + 1]
                    orders_nothing |= threads == 32  # a single warp, whose lanes run together
                    orders_nothing |= not is_contended(touched, name)  # each warp keeps to its own places
                    assert orders_nothing, (name, number, around[number], around[number + 1])
                    assert all(torch.equal(value, right[key]) for key, value in values.items())
                    redundant.append((name, number))
    print(f'{case}: {len(found)} found, {len(redundant)} redundant: {redundant}')
    # In NCHW a channel's lanes are in one warp; in channels_last there is a single row of moments here, nothing to add.
    expected = {'add_partials_kernel', 'backward_kernel' if case.layout == NHWC else 'join_moments_kernel'}
    assert {name for name, _ in found} >= expected
    assert len(found) > len(redundant)
