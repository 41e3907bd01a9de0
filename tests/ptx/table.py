"""The table of counts, counts.csv: what the kernels execute, an element of the map; made by tools/dev/kernel_counts.py.

instructions: Of lanes, 32 for each that a warp executes.
l1_loaded, l1_stored, dram_loaded, dram_stored: In maps: 32-byte sectors that each access of a warp touches, and those
    that a launch touches at all, which is the least that can come from DRAM.
access_bits: Of a lane's access to global memory, on average.
conflicts: Additional turns of the banks of shared memory, a thousand elements.
launches: Of kernels.
"""

from __future__ import annotations

import csv
import itertools
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
import triton

from bnet_mm.ops.triton import launchers
from ptx.driver import Machine, machine

FILE = Path(__file__).with_name('counts.csv')
DOCUMENT = Path(__file__).resolve().parents[2] / 'bnet_mm' / 'ops' / 'README.md'
CAPABILITY = 90
MAPS = ((2, 64, 56, 56), (2, 256, 14, 14), (2, 512, 7, 7), (1, 256, 50, 83))
DTYPES = ('float32', 'float16', 'bfloat16')
LAYOUTS = {'NCHW': torch.contiguous_format, 'NHWC': torch.channels_last}
KERNELS = {'forward': (3, 5, 7), 'backward': (3, 5, 7), 'moments': (0,), 'moments_backward': (0,)}
FIGURES = (
    'instructions', 'l1_loaded', 'l1_stored', 'dram_loaded', 'dram_stored', 'access_bits', 'conflicts', 'launches',
)  # fmt: skip


class Key(NamedTuple):
    """A row: of which kernel the counts are; k is 0 where there are no taps."""

    kernel: str
    map: str
    dtype: str
    layout: str
    k: int

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(map(int, self.map.split('x')))


Figures = dict[str, float]


def keys() -> list[Key]:
    """All rows that the table should have, in its order."""
    return [
        Key(kernel, 'x'.join(map(str, shape)), dtype, layout, k)
        for kernel, shape, dtype, layout in itertools.product(KERNELS, MAPS, DTYPES, LAYOUTS)
        for k in KERNELS[kernel]
    ]


def count(key: Key) -> Figures:
    """Execute the kernel and count; all gradients are wanted of backward."""
    torch.manual_seed(0)
    dtype, c = getattr(torch, key.dtype), key.shape[1]
    x, grad = (torch.randn(key.shape).to(dtype).contiguous(memory_format=LAYOUTS[key.layout]) for _ in range(2))
    mean, rstd = torch.randn(c), torch.rand(c) + 0.5
    weight, bias = torch.randn(c, 1, max(1, key.k), max(1, key.k)), torch.randn(c)
    calls = {
        'forward': lambda: launchers.forward(x, mean, rstd, weight, bias, None, False),
        'backward': lambda: launchers.backward(grad, x, mean, rstd, weight, True, True),
        'moments': lambda: launchers.moments(x, True),
        'moments_backward': lambda: launchers.moments_backward(grad, x, mean, mean, rstd),
    }
    with machine(CAPABILITY, counting=True) as gpu:
        calls[key.kernel]()
    return figures(gpu, x)


def figures(gpu: Machine, x: torch.Tensor) -> Figures:
    counts, maps = gpu.total(), x.numel() * x.element_size() / 32
    widths = Counter({name: number for name, number in counts.items() if name.endswith(' bits')})
    bits = sum(int(name.split()[1]) * number for name, number in widths.items())
    found = dict(
        instructions=counts['instructions'] / x.numel(),
        l1_loaded=counts['sectors loaded'] / maps,
        l1_stored=counts['sectors stored'] / maps,
        dram_loaded=counts['sectors loaded once'] / maps,
        dram_stored=counts['sectors stored once'] / maps,
        access_bits=bits / widths.total(),
        conflicts=1000 * counts['shared conflicts'] / x.numel(),
        launches=len(gpu.launches),
    )
    return {name: round(value, 3) for name, value in found.items()}


def read(path: Path = FILE) -> dict[Key, Figures]:
    """The rows of the file."""
    with path.open(newline='') as file:
        rows = csv.DictReader(line for line in file if not line.startswith('#'))
        return {
            Key(row['kernel'], row['map'], row['dtype'], row['layout'], int(row['k'])): {
                name: float(row[name]) for name in FIGURES
            }
            for row in rows
        }


def compiler(path: Path = FILE) -> str:
    """The version of Triton whose compiler made what the file counts."""
    return path.read_text().split('\n')[0].rpartition(' ')[2]


def write(rows: dict[Key, Figures], path: Path = FILE) -> None:
    with path.open('w', newline='') as file:
        file.write(f'# tools/dev/kernel_counts.py; see table.py; sm_{CAPABILITY}, Triton {triton.__version__}\n')
        writer = csv.writer(file, lineterminator='\n')
        writer.writerow((*Key._fields, *FIGURES))
        for key in keys():
            if key in rows:
                writer.writerow((*key, *(f'{rows[key][name]:g}' for name in FIGURES)))


def differences(rows: dict[Key, Figures], wanted: Iterable[Key]) -> list[str]:
    """What is counted now, and is not what ``rows`` say."""
    found = []
    for key in wanted:
        now = count(key)
        row = ' '.join(map(str, key))
        if key not in rows:
            found.append(f'{row}: not in the table')
            continue
        for name, old in rows[key].items():
            if f'{now[name]:g}' != f'{old:g}':
                found.append(f'{row}: {name} {old:g} in the table, {now[name]:g} counted')
    return found


def markdown(rows: dict[Key, Figures]) -> str:
    """Instructions an element, and maps through L1 in brackets, by map: k = 3 / 5 / 7 where there are taps."""
    lines = [
        f'| kernel | {" | ".join(str(shape) for shape in MAPS)} |',
        f'|---|{"---|" * len(MAPS)}',
    ]
    for kernel, dtype, layout in itertools.product(KERNELS, DTYPES, LAYOUTS):
        cells = []
        for shape in MAPS:
            own = [rows.get(Key(kernel, 'x'.join(map(str, shape)), dtype, layout, k)) for k in KERNELS[kernel]]
            instructions = ' / '.join(f'{one["instructions"]:.0f}' if one else '-' for one in own)
            through_l1 = ' / '.join(f'{one["l1_loaded"] + one["l1_stored"]:.1f}' if one else '-' for one in own)
            cells.append(f'{instructions} ({through_l1})')
        lines.append(f'| {kernel} {dtype} {layout} | {" | ".join(cells)} |')
    return '\n'.join(lines)


def with_table(text: str, rows: dict[Key, Figures]) -> str:
    """A document with the table between its marks."""
    begin, end = '<!-- counts -->\n', '\n<!-- /counts -->'
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    return f'{before}{begin}{markdown(rows)}{end}{after}'
