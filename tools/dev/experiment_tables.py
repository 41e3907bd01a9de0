"""The tables and curves of configs/experiments/README.md: python tools/dev/experiment_tables.py [--check]

Of every plan there, from the .csv file beside it; a plan's place in the page stands between
<!-- experiment: NAME --> and <!-- /experiment -->. --check writes nothing and fails if the page is stale.
"""

from __future__ import annotations

from checkout import ROOT  # first: is this the right Python?

# isort: split

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

from bnet_mm.cli import UserError, run_tool
from bnet_mm.experiments.plan import Plan, read_plan
from bnet_mm.experiments.runs import DONE, Result, read_results
from bnet_mm.experiments.tables import CLAIMS, VARIANTS, claim_rows, draw, variant_rows
from bnet_mm.files import written
from bnet_mm.visualization.figures import save
from pages import fill, markdown

FOLDER = ROOT / 'configs' / 'experiments'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--check', action='store_true', help='write nothing, fail if the page is stale')
    args = parser.parse_args()
    page = FOLDER / 'README.md'
    old = page.read_text()
    new = page_text(old, FOLDER)
    if args.check and new != old:
        raise UserError(f'{page.relative_to(ROOT)} is stale; run python tools/dev/experiment_tables.py')
    if not args.check:
        with written(page) as temporary:
            temporary.write_text(new)
        for plan in plans(FOLDER):
            if results := read_results(plan.csv):
                save(draw(plan, results), plan.path.with_suffix('.png'), dpi=80)


def plans(folder: Path) -> list[Plan]:
    return [read_plan(path) for path in sorted(folder.glob('*.yml'))]


def page_text(text: str, folder: Path) -> str:
    """The page with what came out of every plan of its folder.

    Raises:
        UserError: If a plan has no place in the page.
    """
    return fill(text, 'experiment', {plan.name: list(section(plan, read_results(plan.csv))) for plan in plans(folder)})


def section(plan: Plan, results: Sequence[Result]) -> Iterator[str]:
    """About a plan, its claims, its variants, what it took."""
    yield f'{plan.about} Metric: {plan.metric}. `python tools/experiment.py configs/experiments/{plan.path.name}`'
    yield ''
    if not results:
        yield 'Not run yet.'
        return
    yield from markdown(CLAIMS, claim_rows(plan, results))
    yield ''
    yield from markdown(VARIANTS, variant_rows(plan, results))
    yield ''
    done = [result for result in results if result.status == DONE]
    minutes = sum(result.seconds for result in done) / 60
    where = '; '.join(
        sorted({f'{result.device}, {result.threads} thread{"s" * (result.threads > 1)}' for result in done})
    )
    dates = sorted({result.date for result in done})
    yield f'{len(done)} runs, {minutes:.0f} minutes in all ({where}; {dates[0]} to {dates[-1]}).'
    yield ''
    yield f'![{plan.name}: loss and {plan.metric} of every epoch, mean and deviation]({plan.name}.png)'


if __name__ == '__main__':
    run_tool(main)
