"""The tables of speed in bnet_mm/ops/README.md, from the rows that benchmark.py has written."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable
from pathlib import Path

from bnet_mm.cli import UserError
from checkout import ROOT

README = ROOT / 'bnet_mm' / 'ops' / 'README.md'
KERNEL_SIZES = (3, 5, 7)
FUSED_BN = 'BN, fused tail'  # BNET-1 at C: BN, the residual's sum and ReLU in one pass
Results = dict[str, dict[str, dict[str, str]]]  # quantity -> name of what was measured -> row


def latest(path: Path) -> dict[str, Results]:
    """The last measurement of everything in a CSV file, by device: ``AVX2`` for two threads of an x86 with that."""
    found: dict[str, Results] = {}
    with path.open(newline='') as file:
        for row in csv.DictReader(file):
            device = row['device'].removeprefix('x86_64 ').replace(', 2 threads', '')
            found[device] = found.pop(device, {})  # that of the last row is the last one
            found[device].setdefault(row['quantity'], {})[row['name']] = row
    return found


def kernel_table(found: dict[str, Results]) -> list[str]:
    """Ratios to BN of one benchmark, by kernel size; the two-operator form's in brackets."""
    results = {f'{quantity}, {device}': rows for device, part in found.items() for quantity, rows in part.items()}
    fused = [FUSED_BN] if any(FUSED_BN in rows for rows in results.values()) else []
    header = ['what', 'BN', *fused, *(f'k = {k}' for k in KERNEL_SIZES)]
    lines = ['| ' + ' | '.join(header) + ' |', '|' + '---|' * len(header)]
    for quantity, rows in results.items():
        cells = [f'{float(rows["BN"]["value"]):.1f} {rows["BN"]["unit"]}']
        cells += [f'{float(rows[name]["ratio_to_bn"]):.2f}' if name in rows else '' for name in fused]
        for k in KERNEL_SIZES:
            ratio, two = rows[f'BNET-{k}']['ratio_to_bn'], rows.get(f'two operators, k={k}')
            cells.append(f'{float(ratio):.2f}' + (f' ({float(two["ratio_to_bn"]):.2f})' if two else ''))
        lines.append(f'| {quantity} | ' + ' | '.join(cells) + ' |')
    return lines


def norm_table(found: dict[str, Results]) -> list[str]:
    """Ratios to BN of every norm, on the device that was measured last."""
    device, results = list(found.items())[-1]
    quantities = ('training step', 'inference', 'saved for backward')
    lines = [f'| norm, {device} | ' + ' | '.join(quantities) + ' |', '|---|---|---|---|']
    for name in results[quantities[0]]:
        cells = (f'{float(results[quantity][name]["ratio_to_bn"]):.2f}' for quantity in quantities)
        lines.append(f'| {name} | ' + ' | '.join(cells) + ' |')
    return lines


def write_readme(out: Path, benchmarks: Iterable[str], check: bool) -> None:
    """Write every table between ``<!-- speed: WHAT -->`` and ``<!-- /speed -->`` anew.

    Raises:
        UserError: If the page lacks a table; with ``check``, if a table is stale.
    """
    text = README.read_text()
    if missing := set(benchmarks) - set(re.findall(r'<!-- speed: (\w+) -->', text)):
        raise UserError(f'bnet_mm/ops/README.md has no place for the table of {", ".join(sorted(missing))}')

    def table(match: re.Match) -> str:
        lines = (norm_table if match[1] == 'norms' else kernel_table)(latest(out / f'{match[1]}.csv'))
        return '\n'.join([f'<!-- speed: {match[1]} -->', *lines, '<!-- /speed -->'])

    new = re.sub(r'<!-- speed: (\w+) -->.*?<!-- /speed -->', table, text, flags=re.DOTALL)
    if new == text:
        return
    if check:
        raise UserError(
            'bnet_mm/ops/README.md: the tables of speed are stale; run python tools/dev/benchmark.py readme'
        )
    README.write_text(new)
