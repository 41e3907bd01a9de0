"""What a warp does as one: matrices in its registers (ldmatrix, stmatrix, mma), reductions (redux).

In a fragment of a matrix (PTX ISA, 'Matrix multiply-accumulate operation'), lane ``4 * group + member`` holds row
``group`` and the columns that start at ``E * member``, E elements a register: 2 of 16 bits, 1 of 32.
"""

from __future__ import annotations

import re

import numpy as np

from ptx.faults import Fault, UnknownInstruction
from ptx.reader import Instruction

OPCODES = ('ldmatrix', 'stmatrix', 'mma')
REDUCTIONS = {
    'add': np.add, 'min': np.fmin, 'max': np.fmax, 'and': np.bitwise_and, 'or': np.bitwise_or, 'xor': np.bitwise_xor,
}  # fmt: skip
WARP = 32
LANE = np.arange(WARP)
GROUP, MEMBER = LANE // 4, LANE % 4
OPERANDS = {'f16': 2, 'bf16': 2, 'tf32': 1}  # elements of a register


def write(writer, number: int, i: Instruction) -> None:
    """The code of one of OPCODES; ``writer`` as in translate.py."""
    lists = [[part.strip() for part in operand.strip('{} ').split(',')] for operand in i.operands]
    mask = writer.mask(i)
    if i.opcode == 'mma':
        registers = [f'[{", ".join(writer.read(name, "u4") for name in names)}]' for names in lists[1:]]
        writer.lines.append(f'got = L.multiply(I[{number}], {", ".join(registers)}, {mask})')
    elif not i.has('m8n8') or i.kind != 'b16':
        raise UnknownInstruction(i.name)
    elif i.opcode == 'ldmatrix':
        where = writer.address(i.operands[1], 4)
        writer.lines.append(f'got = L.load_matrices(I[{number}], {where}, {len(lists[0])}, {mask})')
    else:
        where = writer.address(i.operands[0], 4)
        stored = ', '.join(writer.read(name, 'u4') for name in lists[1])
        writer.lines.append(f'L.store_matrices(I[{number}], {where}, [{stored}], {mask})')
        return
    for n, name in enumerate(lists[0]):
        writer.assign(name, f'got[{n}]', i)


class WarpMixin:
    """The part of a launch (launch.py) that these instructions call."""

    def load_matrices(self, i: Instruction, address: np.ndarray, count: int, mask: np.ndarray | None) -> list:
        self.whole_warps(i, mask)
        words = (self.shared.load(i, self._rows(i, address, n), 4, 1, mask)[0] for n in range(count))
        return [_transpose(word) if i.has('trans') else word for word in words]

    def store_matrices(
        self, i: Instruction, address: np.ndarray, values: list[np.ndarray], mask: np.ndarray | None
    ) -> None:
        self.whole_warps(i, mask)
        for n, value in enumerate(values):
            value = self.full(value)
            self.shared.store(i, self._rows(i, address, n), [_transpose(value) if i.has('trans') else value], mask)

    def _rows(self, i: Instruction, address: np.ndarray, n: int) -> np.ndarray:
        """Where each lane's word of the n-th matrix is: lanes 8 n ... 8 n + 7 have the addresses of its rows."""
        rows = self.full(address).reshape(-1, WARP)[:, 8 * n : 8 * n + 8]
        if (rows % 16).any():
            raise self.fault(Fault.MISALIGNED, i, np.flatnonzero(self.full(address) % 16), detail='row of a matrix')
        return (rows[:, GROUP] + (4 * MEMBER).astype('u4')).reshape(-1)

    def multiply(self, i: Instruction, a: list, b: list, c: list, mask: np.ndarray | None) -> list[np.ndarray]:
        """D = A * B + C, rounded once; a GPU adds the products in an order of its own."""
        self.whole_warps(i, mask)
        shape = re.fullmatch(r'm16n8k(\d+)', i.modifiers[2])
        kinds = i.modifiers[-4:]
        if not shape or kinds[1] not in OPERANDS or kinds[1] != kinds[2] or kinds[0] != 'f32' or kinds[3] != 'f32':
            raise UnknownInstruction(i.name)
        k, kind, each = int(shape[1]), kinds[1], OPERANDS[kinds[1]]
        warps = self.lanes // WARP
        left, right = np.zeros((warps, 16, k)), np.zeros((warps, k, 8))
        for n, register in enumerate(a):
            for half, value in enumerate(self._elements(register, kind)):
                left[:, GROUP + 8 * (n % 2), each * MEMBER + half + 4 * each * (n // 2)] = value
        for n, register in enumerate(b):
            for half, value in enumerate(self._elements(register, kind)):
                right[:, each * MEMBER + half + 4 * each * n, GROUP] = value
        product = left @ right
        places = [(GROUP + 8 * (n // 2), 2 * MEMBER + n % 2) for n in range(4)]
        return [
            (product[:, row, column] + self.full(value).view('f4').reshape(-1, WARP))
            .astype('f4')
            .view('u4')
            .reshape(-1)
            for (row, column), value in zip(places, c)
        ]

    def reduce(self, i: Instruction, value: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
        """redux.sync: all lanes have the result."""
        self.whole_warps(i, mask)
        value = self.full(value).reshape(-1, WARP)
        return np.repeat(REDUCTIONS[i.modifiers[1]].reduce(value, 1, value.dtype), WARP)

    def _elements(self, register: np.ndarray, kind: str) -> list[np.ndarray]:
        bits = self.full(register).reshape(-1, WARP)
        if kind == 'tf32':  # the hardware does not look at the 13 last bits
            return [(bits & np.uint32(0xFFFFE000)).view('f4')]
        halves = (bits.astype('u2'), (bits >> np.uint32(16)).astype('u2'))
        if kind == 'f16':
            return [half.view('f2') for half in halves]
        return [(half.astype('u4') << np.uint32(16)).view('f4') for half in halves]

    def whole_warps(self, i: Instruction, mask: np.ndarray | None) -> None:
        if mask is None:
            return
        here = self.full(mask).reshape(-1, WARP)
        missing = here.any(1, keepdims=True) & ~here
        if missing.any():
            raise self.fault(Fault.WARP, i, np.flatnonzero(missing))


def _transpose(words: np.ndarray) -> np.ndarray:
    """Each matrix of 8 x 8 elements of 16 bits, as a warp's words hold it, transposed."""
    halves = words.reshape(-1, WARP)
    matrix = np.stack([halves.astype('u2'), (halves >> np.uint32(16)).astype('u2')], -1).reshape(-1, 8, 8)
    pairs = matrix.transpose(0, 2, 1).reshape(-1, WARP, 2).astype('u4')
    return (pairs[..., 0] | pairs[..., 1] << np.uint32(16)).reshape(-1)
