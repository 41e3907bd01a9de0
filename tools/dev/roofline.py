"""Prints bounds of the GPU kernels' time: python tools/dev/roofline.py [--card NAME ...] [--format text|markdown]

From the counts of tests/ptx/counts.csv (instructions and traffic of the kernels as compiled for sm_90, executed on the
CPU; tools/dev/kernel_counts.py) and the cards' published figures. The time of a kernel is taken as the largest of what
issuing its instructions, L1 and DRAM need; what is printed is its ratio to the DRAM time of what batch norm must move:
2 maps forward, 3 backward with fixed statistics, 8 in a training step with batch statistics. No card reaches the bound:
latency, launches, the CPU and clocks below the published ones are not in it.
"""

from __future__ import annotations

import checkout  # noqa: F401  (first: is this the right Python?)

# isort: split

import argparse
from collections.abc import Iterator
from typing import NamedTuple

from bnet_mm.cli import run_tool

HEADING = 'computed from executed instructions, not timed'
WARP_LANES = 4 * 32  # of a multiprocessor in a cycle: each of its four schedulers issues for one warp
COMPULSORY = {'forward': 2, 'backward': 3, 'training': 8}  # maps that batch norm moves
STEP = ('moments', 'forward', 'backward', 'moments_backward')
ITEM = {'float32': 4, 'float16': 2, 'bfloat16': 2}


class Card(NamedTuple):
    """Published figures: multiprocessors, boost clock in GHz, bytes of L1 a cycle and multiprocessor, DRAM in TB/s."""

    multiprocessors: int
    clock: float
    l1_bytes: int
    dram: float

    @property
    def issue(self) -> float:
        """Lane instructions a second."""
        return self.multiprocessors * self.clock * 1e9 * WARP_LANES

    @property
    def l1(self) -> float:
        return self.multiprocessors * self.clock * 1e9 * self.l1_bytes


CARDS = {
    'H100': Card(132, 1.98, 128, 3.35),  # SXM5: data sheet (67 TFLOPS of float32, 3.35 TB/s)
    'A100': Card(108, 1.41, 128, 2.039),  # SXM4 80 GB: Ampere white paper
    'RTX 4090': Card(128, 2.52, 128, 1.008),  # Ada white paper
    'T4': Card(40, 1.59, 64, 0.32),  # Turing white paper
}


class Bound(NamedTuple):
    """Seconds an element, and what takes them."""

    seconds: float
    by: str


def bound(card: Card, counts: dict[str, float], item: int) -> Bound:
    """Of one kernel: the largest of issue, L1 and DRAM."""
    times = {
        'issue': counts['instructions'] / card.issue,
        'L1': (counts['l1_loaded'] + counts['l1_stored']) * item / card.l1,
        'DRAM': (counts['dram_loaded'] + counts['dram_stored']) * item / (card.dram * 1e12),
    }
    by = max(times, key=times.get)
    return Bound(times[by], by)


def ratios(card: Card, rows: dict, wanted: tuple[str, str, str, int]) -> dict[str, str]:
    """Forward, backward and the training step of (map, dtype, layout, k), to batch norm's DRAM time."""
    shape, dtype, layout, k = wanted
    map_seconds = ITEM[dtype] / (card.dram * 1e12)
    bounds = {}
    for key, counts in rows.items():
        if (key.map, key.dtype, key.layout) == (shape, dtype, layout) and key.k in (0, k):
            bounds[key.kernel] = bound(card, counts, ITEM[dtype])
    found = {
        name: f'{bounds[name].seconds / map_seconds / COMPULSORY[name]:.2f} {bounds[name].by}'
        for name in ('forward', 'backward')
        if name in bounds
    }
    if set(STEP) <= bounds.keys():
        total = sum(bounds[name].seconds for name in STEP)
        found['training'] = f'{total / map_seconds / COMPULSORY["training"]:.2f}'
    return found


def page(cards: list[str], rows: dict, compiler: str, markdown: bool) -> Iterator[str]:
    """The lines of the output: a table for each card."""
    yield f'Ratio to the DRAM time of batch norm, and what bounds it; {HEADING}. Triton {compiler}, sm_90.'
    wanted = list(dict.fromkeys((key.map, key.dtype, key.layout, key.k) for key in rows if key.k))
    for name in cards:
        card = CARDS[name]
        grid = [['map', 'dtype', 'layout', 'k', *COMPULSORY]]
        for row in wanted:
            found = ratios(card, rows, row)
            grid.append([*map(str, row), *(found.get(kind, '-') for kind in COMPULSORY)])
        widths = [max(map(len, column)) for column in zip(*grid)]
        if markdown:
            grid.insert(1, ['-' * width for width in widths])
        yield ''
        title = f'**{name}**' if markdown else name
        figures = f'{card.issue / 1e12:.1f}e12 lane instructions, {card.l1 / 1e12:.1f} TB of L1, {card.dram} TB of DRAM'
        yield f'{title}: {figures} a second'
        if markdown:
            yield ''
        for line in grid:
            cells = [cell.ljust(width) for cell, width in zip(line, widths)]
            yield f'| {" | ".join(cells)} |' if markdown else '  '.join(cells).rstrip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--card', nargs='+', choices=CARDS, default=list(CARDS), help='only these')
    parser.add_argument('--format', choices=['text', 'markdown'], default='text', help='of the output (text)')
    args = parser.parse_args()
    from ptx import table

    print('\n'.join(page(args.card, table.read(), table.compiler(), args.format == 'markdown')))


if __name__ == '__main__':
    run_tool(main)
