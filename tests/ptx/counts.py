"""Counts of what a launch executes. No noise touches them: they are the same on every machine.

instructions: Of lanes, 32 for each warp that executes one, whether all its lanes are here or one.
<load or store> <n> bits: Lanes' global accesses by width.
sectors <loaded or stored>: 32-byte sectors that each access of a warp touches: what goes through L1.
sectors <loaded or stored> once: Those that the launch touches at all: DRAM's least.
shared accesses, shared conflicts: Of warps; how many more turns the 32 banks need than one each.
"""

from __future__ import annotations

import numpy as np

from ptx.reader import Block, Instruction

SECTOR = 32
WARP = 32
BANKS = 32


def count_block(launch, block: Block, active: np.ndarray | None) -> None:
    warps = launch.lanes // WARP if active is None else int(active.reshape(-1, WARP).any(1).sum())
    launch.counts['instructions'] += len(block.instructions) * warps * WARP


def count_access(launch, space: str, i: Instruction, where: np.ndarray, lanes: np.ndarray | slice, size: int) -> None:
    """``where``: addresses of the lanes ``lanes``, ``size`` bytes each."""
    if not launch.counting or not len(where):
        return
    warp = np.arange(launch.lanes)[lanes] // WARP
    if space == 'global':
        what = 'load' if i.opcode == 'ld' else 'store'
        launch.counts[f'{what} {8 * size} bits'] += len(where)
        launch.counts[f'sectors {what.rstrip("e")}ed'] += _distinct(warp, where.astype('i8') // SECTOR)
    else:
        launch.counts['shared accesses'] += len(np.unique(warp))
        launch.counts['shared conflicts'] += bank_conflicts(warp, np.arange(launch.lanes)[lanes] % WARP, where, size)


def _distinct(group: np.ndarray, value: np.ndarray) -> int:
    """How many different values all groups have together."""
    keys = group << 43 | value  # a sector's number has 42 bits at most
    keys.sort()
    return 1 + int(np.count_nonzero(keys[1:] != keys[:-1]))


def bank_conflicts(warp: np.ndarray, lane: np.ndarray, where: np.ndarray, size: int) -> int:
    """Turns beyond the first of every access. Of 8 and 16 bytes, halves and quarters of a warp have their own turn."""
    words = max(1, size // 4)
    turn = np.repeat(warp * words + lane // (WARP // words), words)
    word = np.repeat(where // 4, words) + np.tile(np.arange(words), len(where))
    different = np.unique(turn << 20 | (word % BANKS) << 14 | word // BANKS)  # lanes that read one word share it
    banks, turns = np.unique(different >> 14, return_counts=True)
    most = np.ones(int(banks[-1] >> 6) + 1, 'i8')
    np.maximum.at(most, banks >> 6, turns)
    return int((most - 1).sum())
