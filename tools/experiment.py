"""Compare norms with seeds and intervals: python tools/experiment.py PLAN.yml [--workers N] [--dry-run | --report]

Trains what the plan says with tools/train.py, all variants of one seed before the next seed, and writes a line per run
into RESULTS/PLAN.csv. Typed again, it goes on: runs that are done are not repeated, one that was killed goes on from
its last epoch, one that failed is tried again; a run that another plan has too, with the same config and seed, is
trained once. Then, or with --report at any time, it prints the tables.
"""

from __future__ import annotations

import environment  # noqa: F401  (first: is this the right Python?)

# isort: split

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from bnet_mm.cli import UserError, run_tool
from bnet_mm.experiments.plan import Plan, read_plan
from bnet_mm.experiments.runs import DONE, Result, read_results, run_plan, still_to_run
from bnet_mm.experiments.tables import CLAIMS, VARIANTS, claim_rows, variant_rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('plan', type=Path, help='such as configs/experiments/imagenette_resnet.yml')
    parser.add_argument('--workers', type=int, default=1, metavar='N', help='runs at a time, which share the cores (1)')
    parser.add_argument(
        '--work-dir', type=Path, default=Path('work_dirs/experiments'), help='for logs and checkpoints (%(default)s)'
    )
    parser.add_argument(
        '--results', type=Path, help='folder of the .csv files (the work dir); configs/experiments has published ones'
    )
    only = parser.add_mutually_exclusive_group()
    only.add_argument('--dry-run', action='store_true', help='print the runs that are left, and train nothing')
    only.add_argument('--report', action='store_true', help='print the tables of what is done, and train nothing')
    args = parser.parse_args()
    if args.workers < 1:
        raise UserError(f'--workers takes a number above 0, got {args.workers}')
    if args.results and not args.results.is_dir():
        raise UserError(f'--results {args.results} is no folder')
    plan = read_plan(args.plan, args.results or args.work_dir)
    waiting = still_to_run(plan)
    console = Console(width=None if sys.stdout.isatty() else 160)
    if args.dry_run:
        for variant, seed in waiting:
            print(f'{variant.name}, seed {seed}')
    elif not args.report:
        train(plan, len(waiting), args.work_dir, args.workers, console)
    if not args.dry_run:
        results = read_results(plan.csv)
        show(console, f'{plan.name}: {plan.metric}', VARIANTS, variant_rows(plan, results))
        show(console, 'the claims', CLAIMS, claim_rows(plan, results))


def train(plan: Plan, left: int, folder: Path, workers: int, console: Console) -> None:
    columns = (TextColumn('{task.description}'), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn('left:'), TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task(plan.name, total=left)

        def report(result: Result) -> None:
            outcome = f'{plan.metric} {result.last:.2f}' if result.status == DONE else f'failed: {result.status}'
            progress.console.print(f'{result.variant}, seed {result.seed}: {outcome}, {result.seconds:.0f} s')
            progress.advance(task)

        run_plan(plan, folder, workers, report)


def show(console: Console, title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = Table(title=title)
    for name in header:
        table.add_column(name)
    for row in rows:
        table.add_row(*row)
    console.print(table)


if __name__ == '__main__':
    run_tool(main)
