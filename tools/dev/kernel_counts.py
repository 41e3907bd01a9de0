"""Counts what the compiled GPU kernels execute: python tools/dev/kernel_counts.py [--check] [--only WORD ...]

Writes tests/ptx/counts.csv and the table of bnet_mm/ops/README.md: instructions, traffic and conflicts of the Triton
kernels as compiled for sm_90, executed on the CPU (tests/ptx). No GPU is needed, and no noise touches the counts: what
changes them is a change of the kernels, of their plans, or of Triton. --check writes nothing, and fails if a count is
another one. Compiling takes most of the time: half an hour for all rows the first time, afterwards Triton's cache has
the kernels.
"""

from __future__ import annotations

import checkout  # noqa: F401  (first: is this the right Python?)

# isort: split

import argparse

from bnet_mm.cli import UserError, run_tool


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--check', action='store_true', help='compare with the file and write nothing')
    parser.add_argument('--only', nargs='+', default=[], metavar='WORD', help='rows with all of these, such as k3 NCHW')
    args = parser.parse_args()
    import triton

    from ptx import table

    chosen = [key for key in table.keys() if set(args.only) <= {*map(str, key), f'k{key.k}'}]
    if not chosen:
        raise UserError(f'--only {" ".join(args.only)}: no row has all of these')
    same_compiler = table.compiler() == triton.__version__
    if (args.check or args.only) and not same_compiler:
        raise UserError(f'counts.csv is of Triton {table.compiler()}, this is {triton.__version__}: count all rows')
    rows = table.read() if same_compiler else {}
    if args.check:
        problems = table.differences(rows, chosen)
        if problems:
            raise UserError(f'{len(problems)} counts differ:\n' + '\n'.join(problems))
        print(f'{len(chosen)} rows are as the kernels are')
        return
    for number, key in enumerate(chosen, 1):
        rows[key] = table.count(key)
        print(f'{number}/{len(chosen)}', *key, *(f'{name} {value:g}' for name, value in rows[key].items()), flush=True)
        table.write(rows)
    table.DOCUMENT.write_text(table.with_table(table.DOCUMENT.read_text(), rows))


if __name__ == '__main__':
    run_tool(main)
