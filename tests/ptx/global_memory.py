"""The tensors that a launch may touch, and who of its programs has touched what."""

from __future__ import annotations

import mmap
from collections import Counter
from collections.abc import Iterable

import numpy as np

from ptx.counts import SECTOR, count_access
from ptx.faults import Fault
from ptx.reader import Instruction
from ptx.values import UNSET

SEVERAL = -1


class Buffer:
    """The memory of one tensor, and for every granule of it the program, plus 1, that wrote it, and that read it."""

    def __init__(self, start: int, length: int, name: str):
        self.start, self.stop, self.name = start, start + length, name
        self._views: dict[int, np.ndarray] = {}

    def view(self, size: int) -> np.ndarray:
        if size not in self._views:
            self._views[size] = np.asarray(_Memory(self.start, (self.stop - self.start) // size, size))
        return self._views[size]

    def watch(self, granule: int) -> None:
        number = -(-(self.stop - self.start) // granule)
        self.writer, self.reader = _zeros(number, 'i4'), _zeros(number, 'i4')
        sectors = (self.stop - 1) // SECTOR - self.start // SECTOR + 1
        self.loaded, self.stored = _zeros(sectors, '?'), _zeros(sectors, '?')


class _Memory:
    def __init__(self, start: int, count: int, size: int):
        self.__array_interface__ = {'data': (start, False), 'shape': (count,), 'typestr': f'<u{size}', 'version': 3}


def _zeros(count: int, dtype: str) -> np.ndarray:
    """Memory that exists once it is touched: tensors may be larger than this machine's memory."""
    size = count * np.dtype(dtype).itemsize
    if size < 1 << 26:
        return np.zeros(count, dtype)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, 'MAP_NORESERVE', 0x4000)
    return np.frombuffer(mmap.mmap(-1, size, flags=flags), dtype)


class GlobalMemory:
    """Loads and stores of a launch. ``launch`` is set by it.

    Args:
        ranges: (address, bytes, name) of each tensor.
        granule: Bytes of the smallest access of the kernel.
    """

    def __init__(self, ranges: Iterable[tuple[int, int, str]], granule: int):
        self.buffers = [Buffer(*range_) for range_ in sorted(set(ranges)) if range_[1]]
        self.starts = np.array([buffer.start for buffer in self.buffers], 'u8')
        self.stops = np.array([buffer.stop for buffer in self.buffers], 'u8')
        self.granule = granule
        for buffer in self.buffers:
            buffer.watch(granule)
        self.launch = None

    def load(self, i: Instruction, address: np.ndarray, size: int, width: int, mask: np.ndarray | None) -> list:
        """``width`` elements of ``size`` bytes of each lane; lanes that are masked off have a NaN."""
        selected = self.launch.selected(mask)
        values = [np.full(self.launch.lanes, UNSET[size], f'u{size}') for _ in range(width)]
        for buffer, lanes, at in self._parts(i, address, selected, size * width):
            self._note_load(i, buffer, lanes, at, size * width)
            for n, value in enumerate(values):
                value[lanes] = buffer.view(size)[at // size + n]
        return values

    def store(self, i: Instruction, address: np.ndarray, values: list[np.ndarray], mask: np.ndarray | None) -> None:
        selected = self.launch.selected(mask)
        size = values[0].dtype.itemsize
        for buffer, lanes, at in self._parts(i, address, selected, size * len(values)):
            data = buffer.view(size)
            new = [self.launch.full(value)[lanes] for value in values]
            self._note_store(i, buffer, lanes, at, size, new)
            for n, value in enumerate(new):
                data[at // size + n] = value
                lost = data[at // size + n] != value
                if lost.any():
                    program = self.launch.program[lanes]
                    other = buffer.writer[(at + n * size) // self.granule] != program + 1
                    kind = Fault.PROGRAMS if (lost & other).any() else Fault.AMBIGUOUS
                    raise self._fault(kind, i, buffer, lanes, at, lost)

    def _parts(self, i: Instruction, address: np.ndarray, lanes: np.ndarray | slice, size: int):
        """(buffer, lanes, offsets of their addresses in it) of an access; nearly always one buffer."""
        launch = self.launch
        where = launch.full(address)[lanes]
        if not len(where):
            return
        count_access(launch, 'global', i, where, lanes, size)
        low, high = where.min(), where.max()
        first = int(np.searchsorted(self.starts, low, 'right')) - 1
        if size > 1 and (where & np.uint64(size - 1)).any():
            wrong = (where & np.uint64(size - 1)) != 0
            raise self._fault_at(Fault.MISALIGNED, i, lanes, where, wrong, f'{i.name} of {size} bytes')
        if first >= 0 and int(high) + size <= self.buffers[first].stop:
            buffer = self.buffers[first]
            yield buffer, lanes, (where - np.uint64(buffer.start)).astype('i8')
            return
        owner = np.searchsorted(self.starts, where, 'right') - 1
        wrong = (owner < 0) | (where + np.uint64(size) > self.stops[np.maximum(owner, 0)])
        if wrong.any():
            raise self._fault_at(Fault.OUTSIDE, i, lanes, where, wrong)
        numbers = np.arange(launch.lanes)[lanes]
        for index in np.unique(owner):
            chosen = owner == index
            buffer = self.buffers[index]
            yield buffer, numbers[chosen], (where[chosen] - np.uint64(buffer.start)).astype('i8')

    def _note_load(self, i: Instruction, buffer: Buffer, lanes: np.ndarray | slice, at: np.ndarray, size: int) -> None:
        mark = (self.launch.program[lanes] + 1).astype('i4')
        buffer.loaded[(at + buffer.start % SECTOR) // SECTOR] = True
        for step in range(0, size, self.granule):
            granule = (at + step) // self.granule
            writer = buffer.writer[granule]
            if writer.any():
                wrong = (writer != 0) & (writer != mark)
                if wrong.any():
                    raise self._fault(Fault.READ_OF_WRITTEN, i, buffer, lanes, at, wrong)
            old = buffer.reader[granule]
            buffer.reader[granule] = mark
            several = ((old != 0) & (old != mark)) | (buffer.reader[granule] != mark)
            if several.any():
                buffer.reader[granule[several]] = SEVERAL

    def _note_store(
        self, i: Instruction, buffer: Buffer, lanes: np.ndarray | slice, at: np.ndarray, size: int, values: list
    ) -> None:
        mark = (self.launch.program[lanes] + 1).astype('i4')
        buffer.stored[(at + buffer.start % SECTOR) // SECTOR] = True
        data = buffer.view(size)
        for n, value in enumerate(values):
            for step in range(n * size, (n + 1) * size, self.granule):
                granule = (at + step) // self.granule
                reader, writer = buffer.reader[granule], buffer.writer[granule]
                if reader.any():
                    wrong = (reader != 0) & (reader != mark)
                    if wrong.any():
                        raise self._fault(Fault.READ_OF_WRITTEN, i, buffer, lanes, at, wrong)
                if writer.any():
                    wrong = (writer != 0) & (writer != mark)
                    if wrong.any():
                        wrong &= data[at // size + n] != value
                        if wrong.any():
                            raise self._fault(Fault.PROGRAMS, i, buffer, lanes, at, wrong)
                buffer.writer[granule] = mark

    def _fault(self, kind: str, i: Instruction, buffer: Buffer, lanes, at: np.ndarray, wrong: np.ndarray) -> Fault:
        return self._fault_at(kind, i, lanes, at.astype('u8') + np.uint64(buffer.start), wrong)

    def _fault_at(self, kind: str, i: Instruction, lanes, where: np.ndarray, wrong: np.ndarray, detail='') -> Fault:
        numbers = np.arange(self.launch.lanes)[lanes][wrong]
        return self.launch.fault(kind, i, numbers, self.describe(int(where[wrong][0])), detail)

    def describe(self, address: int) -> str:
        """``0x7f.. (x + 12)``: the address, and where it is from the nearest tensor's start."""
        if not self.buffers:
            return f'{address:#x}'
        near = min(self.buffers, key=lambda b: max(b.start - address, address - b.stop, 0))
        return f'{address:#x} ({near.name} {"+" if address >= near.start else "-"} {abs(address - near.start)} bytes)'

    def count_touched(self, counts: Counter) -> None:
        """Sectors that were read and written at all: what at least comes from DRAM and goes there."""
        counts['sectors loaded once'] += sum(int(np.count_nonzero(buffer.loaded)) for buffer in self.buffers)
        counts['sectors stored once'] += sum(int(np.count_nonzero(buffer.stored)) for buffer in self.buffers)
