"""The lanes of one launch: where each is in the kernel, its registers, barriers and shuffles.

Programs run in portions that fit the processor's cache. Lanes that disagree about a branch are run one block at a time,
the lowest first, as compilers lay out code; a lane waits at the block where others are to join it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from types import FunctionType

import numpy as np

from ptx.counts import count_block
from ptx.faults import Fault
from ptx.global_memory import GlobalMemory
from ptx.reader import SIZES, Instruction
from ptx.shared_memory import SharedMemory
from ptx.translate import NAMESPACE, Program
from ptx.values import unset
from ptx.warp import WarpMixin

WARP = 32
LANES = 8192  # of a portion
VISITS = 100_000  # of a block by one portion, before this is called endless


class Registers(dict):
    """Those that outlive a block; what no one has written is a NaN."""

    def __init__(self, kinds: dict[str, str]):
        super().__init__()
        self.kinds = kinds

    def __missing__(self, name: str) -> np.ndarray:
        kind = self.kinds[name]
        return np.zeros(1, '?') if kind == 'pred' else unset(SIZES[kind])


class Launch(WarpMixin):
    """One launch of a kernel.

    grid: Programs along x, y, z.
    threads: Of a program.
    shared_bytes: Of shared memory.
    arguments: Numbers and addresses, in the kernel's order; parameters beyond them are Triton's scratch, 0.
    memory: What may be touched.
    only: Numbers of the programs to run, of grids too large to run whole.
    counts: Is added to; counting: whether sectors and conflicts are counted, which takes time.
    """

    def __init__(
        self,
        program: Program,
        grid: tuple[int, int, int],
        threads: int,
        shared_bytes: int,
        arguments: Sequence[int | float],
        memory: GlobalMemory,
        only: Sequence[int] | None = None,
        counts: Counter | None = None,
        counting: bool = True,
    ):
        self.code, self.kernel, self.grid, self.threads = program, program.kernel, grid, threads
        self.shared_bytes, self.memory = shared_bytes, memory
        self.counts = Counter() if counts is None else counts
        self.counting = counting
        number = grid[0] * grid[1] * grid[2]
        self.programs = np.arange(number, dtype='i8') if only is None else np.asarray(only, 'i8')
        if threads % WARP or self.kernel.threads not in (0, threads):
            raise Fault(Fault.ARGUMENTS, self.kernel.name, detail=f'{threads} threads, for {self.kernel.threads}')
        self.parameters = self._parameters(arguments)

    def _parameters(self, arguments: Sequence[int | float]) -> dict[str, np.ndarray]:
        if len(arguments) > len(self.kernel.parameters):
            detail = f'{len(arguments)} for {len(self.kernel.parameters)} parameters'
            raise Fault(Fault.ARGUMENTS, self.kernel.name, detail=detail)
        padded = [*arguments, *[0] * (len(self.kernel.parameters) - len(arguments))]
        parameters = {}
        for (name, kind), value in zip(self.kernel.parameters, padded):
            if kind in ('f32', 'f64', 'f16') or isinstance(value, float):
                bits = np.array([value], f'f{SIZES[kind]}').view(f'u{SIZES[kind]}')
            else:
                bits = np.array([int(value) & ((1 << 8 * SIZES[kind]) - 1)], f'u{SIZES[kind]}')
            parameters[name] = bits
        return parameters

    def run(self) -> Counter:
        """Run all programs; returns what was counted.

        Raises:
            Fault: For what a GPU's tools would complain of.
        """
        portion = max(1, LANES // self.threads)
        with np.errstate(all='ignore'):
            for first in range(0, len(self.programs), portion):
                self._run_portion(self.programs[first : first + portion])
        self.memory.count_touched(self.counts)
        return self.counts

    def _run_portion(self, programs: np.ndarray) -> None:
        kernel, count = self.kernel, len(programs)
        self.lanes = count * self.threads
        self.program = np.repeat(programs, self.threads)
        self.block = np.repeat(np.arange(count), self.threads)  # number of the program in this portion
        self.thread = np.tile(np.arange(self.threads), count)
        self.all_lanes = np.ones(self.lanes, '?')
        self.shared = SharedMemory(self, count)
        self.special = self._special_registers(programs)
        self.at = np.zeros(self.lanes, 'i4')
        registers, functions, visits = Registers(kernel.registers), {}, Counter()
        self.memory.launch = self
        while True:
            index = int(self.at.min())
            if index >= len(kernel.blocks):
                break
            active = self.at == index
            full = bool(active.all())
            if (index, full) not in functions:
                functions[index, full] = self._function(index, full)
            visits[index] += 1
            if visits[index] > VISITS:
                raise self.fault(Fault.ENDLESS, kernel.blocks[index].instructions[-1])
            active = None if full else active
            count_block(self, kernel.blocks[index], active)
            functions[index, full](self, registers, kernel.blocks[index].instructions, active)

    def _function(self, index: int, full: bool) -> FunctionType:
        code = self.code.code(index, full)
        space = {**NAMESPACE, **self.code.constants}
        exec(code, space)
        return space['block']

    def _special_registers(self, programs: np.ndarray) -> dict[str, np.ndarray]:
        x, y, z = self.grid
        own = {'ctaid.x': programs % x, 'ctaid.y': programs // x % y, 'ctaid.z': programs // (x * y)}
        special = {name: np.repeat(value.astype('u4'), self.threads) for name, value in own.items()}
        special['tid.x'] = self.thread.astype('u4')
        special['laneid'] = (self.thread % WARP).astype('u4')
        same = {'nctaid.x': x, 'nctaid.y': y, 'nctaid.z': z, 'ntid.x': self.threads, 'tid.y': 0, 'tid.z': 0}
        special.update((name, np.array([value], 'u4')) for name, value in same.items())
        return special

    # what the code of blocks calls
    def go(self, block: int, active: np.ndarray | None) -> None:
        if active is None:
            self.at[:] = block
        else:
            self.at[active] = block

    def branch(self, target: int, other: int, guard: np.ndarray | None, active: np.ndarray | None) -> None:
        if guard is None:
            self.go(target, active)
        elif active is None:
            self.at[:] = np.where(guard, target, other)
        else:
            self.at[active] = np.broadcast_to(np.where(guard, target, other), (self.lanes,))[active]

    def barrier(self, instruction: Instruction, active: np.ndarray | None) -> None:
        if active is not None:
            here = active.reshape(-1, self.threads)
            missing = here.any(1, keepdims=True) & ~here
            if missing.any():
                raise self.fault(Fault.BARRIER, instruction, np.flatnonzero(missing))
        self.shared.barrier(active)

    def warp_barrier(self, instruction: Instruction, mask: np.ndarray | None) -> None:
        self.whole_warps(instruction, mask)
        self.shared.warp_barrier(mask)

    def shuffle(
        self, instruction: Instruction, value: np.ndarray, lane: np.ndarray, clamp: np.ndarray, mode: str, mask
    ) -> np.ndarray:
        """shfl.sync (PTX ISA): segments and the bounds of a lane's own are in ``clamp``."""
        value, lane, clamp = (self.full(array).reshape(-1, WARP) for array in (value, lane, clamp))
        own = np.arange(WARP, dtype='i8')[None]
        segment, bound = (clamp >> np.uint32(8) & np.uint32(31)).astype('i8'), (clamp & np.uint32(31)).astype('i8')
        lowest, lane = own & segment, (lane & np.uint32(31)).astype('i8')
        highest = lowest | (bound & ~segment)
        source = {'up': own - lane, 'down': own + lane, 'bfly': own ^ lane, 'idx': lowest | (lane & ~segment)}[mode]
        source = np.where(source >= highest if mode == 'up' else source <= highest, source, own)
        if mask is not None:
            here = self.full(mask).reshape(-1, WARP)
            missing = here & ~np.take_along_axis(here, source, 1)
            if missing.any():
                raise self.fault(Fault.SHUFFLE, instruction, np.flatnonzero(missing))
        return np.take_along_axis(value, source, 1).reshape(-1)

    # help for what is called
    def full(self, value: np.ndarray) -> np.ndarray:
        return value if value.shape == (self.lanes,) else np.broadcast_to(value, (self.lanes,))

    def selected(self, mask: np.ndarray | None) -> np.ndarray | slice:
        """Numbers of the lanes of a mask; a slice if they are all."""
        if mask is None:
            return slice(None)
        mask = self.full(mask)
        return slice(None) if mask.all() else np.flatnonzero(mask)

    def fault(
        self, kind: str, instruction: Instruction, lanes: np.ndarray = (), address: str | None = None, detail: str = ''
    ) -> Fault:
        who = [(int(self.program[lane]), int(self.thread[lane])) for lane in lanes]
        return Fault(kind, self.kernel.name, instruction.source, who, address, detail or instruction.name)
