"""Shared memory of the programs of a portion, and its checks: range, alignment, unwritten words, races."""

from __future__ import annotations

import numpy as np

from ptx.counts import count_access
from ptx.faults import Fault
from ptx.reader import Instruction
from ptx.values import UNSET

# Of each granule, in one number: how many barriers the program had passed, and who it was last. NOBODY is older.
NOBODY = -1
SHIFT, SEVERAL = 6, 63  # a program has at most 32 warps


class SharedMemory:
    """Two warps race where both touch a granule, one of them writes, and the program passed no barrier in between.

    Lanes of one warp are taken to run together. Of one store they may not write different values to one place.
    """

    def __init__(self, launch, programs: int):
        self.launch = launch
        self.granule = launch.code.shared_granule
        self.bytes = max(launch.shared_bytes, 8)
        self.data = np.zeros((programs, -(-self.bytes // 8) * 8), 'u1')
        number = self.data.shape[1] // self.granule
        self.writes = np.full((programs, number), NOBODY, 'i4')
        self.reads = np.full((programs, number), NOBODY, 'i4')
        self.epoch = np.zeros(programs, 'i4')

    def barrier(self, active: np.ndarray | None) -> None:
        if active is None:
            self.epoch += 1
        else:
            self.epoch[active.reshape(len(self.epoch), -1).any(1)] += 1

    def warp_barrier(self, mask: np.ndarray | None) -> None:
        """Of a program that has one warp only it is the barrier."""
        if self.launch.threads == 32:
            self.barrier(None if mask is None else self.launch.full(mask))

    def load(self, i: Instruction, address: np.ndarray, size: int, width: int, mask: np.ndarray | None) -> list:
        lanes = self.launch.selected(mask)
        values = [np.full(self.launch.lanes, UNSET[size], f'u{size}') for _ in range(width)]
        block, at = self._place(i, address, lanes, size * width)
        now = self._mark(block, lanes)
        for step in range(0, size * width, self.granule):
            granule = (at + step) // self.granule
            writes, reads = self.writes[block, granule], self.reads[block, granule]
            self._check(Fault.UNWRITTEN, writes == NOBODY, i, lanes, at)
            self._check(Fault.RACE, (writes >> SHIFT == now >> SHIFT) & (writes != now), i, lanes, at)
            self.reads[block, granule] = now
            several = (self.reads[block, granule] != now) | ((reads >> SHIFT == now >> SHIFT) & (reads != now))
            if several.any():
                self.reads[block[several], granule[several]] = now[several] | SEVERAL
        data = self.data.view(f'u{size}')
        for n, value in enumerate(values):
            value[lanes] = data[block, at // size + n]
        return values

    def store(self, i: Instruction, address: np.ndarray, values: list[np.ndarray], mask: np.ndarray | None) -> None:
        size = values[0].dtype.itemsize
        lanes = self.launch.selected(mask)
        block, at = self._place(i, address, lanes, size * len(values))
        now = self._mark(block, lanes)
        data = self.data.view(f'u{size}')
        for n, value in enumerate(values):
            value = self.launch.full(value)[lanes]
            place = at // size + n
            differs = data[block, place] != value
            for step in range(n * size, (n + 1) * size, self.granule):
                granule = (at + step) // self.granule
                writes, reads = self.writes[block, granule], self.reads[block, granule]
                race = (reads >> SHIFT == now >> SHIFT) & (reads != now)
                race |= (writes >> SHIFT == now >> SHIFT) & (writes != now) & differs
                self._check(Fault.RACE, race, i, lanes, at)
                self.writes[block, granule] = now
            data[block, place] = value
            lost = data[block, place] != value
            if lost.any():
                winner = self.writes[block, (at + n * size) // self.granule]
                self._check(Fault.RACE, lost & (winner != now), i, lanes, at)
                self._check(Fault.AMBIGUOUS, lost, i, lanes, at)

    def _mark(self, block: np.ndarray, lanes: np.ndarray | slice) -> np.ndarray:
        """Who each lane is, and when: its program's barriers so far, and its warp."""
        return self.epoch[block] << SHIFT | (self.launch.thread[lanes] // 32).astype('i4')

    def _place(self, i: Instruction, address: np.ndarray, lanes, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Program in this portion, and address, of each lane."""
        at = self.launch.full(address)[lanes].astype('i8')
        count_access(self.launch, 'shared', i, at, lanes, size)
        self._check(Fault.OUTSIDE, at + size > self.launch.shared_bytes, i, lanes, at, 'of shared memory')
        self._check(Fault.MISALIGNED, at % size != 0, i, lanes, at)
        return self.launch.block[lanes], at

    def _check(self, kind: str, wrong: np.ndarray, i: Instruction, lanes, at: np.ndarray, detail: str = '') -> None:
        if wrong.any():
            numbers = np.arange(self.launch.lanes)[lanes][wrong]
            where = f'{int(at[wrong][0])} of {self.launch.shared_bytes} bytes of shared memory'
            raise self.launch.fault(kind, i, numbers, where, f'{i.name} {detail}'.strip())
