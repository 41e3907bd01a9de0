"""What came out of an experiment, as tables and curves; never a difference without its number of pairs."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from bnet_mm.experiments.paired import paired_difference
from bnet_mm.experiments.plan import Plan
from bnet_mm.experiments.runs import DONE, Result
from bnet_mm.visualization.curves import mean_and_spread
from bnet_mm.visualization.runs import Curve

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CLAIMS = ('claim', 'printed', 'measured here', '95 % interval', 'bootstrap', 'pairs', 'verdict')
VARIANTS = ('variant', 'last epoch', 'best epoch', 'mean of epochs', 'runs', 'minutes a run')


def done_of(results: Iterable[Result], variant: str) -> dict[int, Result]:
    """The runs of a variant that ended well, by seed."""
    return {result.seed: result for result in results if result.variant == variant and result.status == DONE}


def value(result: Result, of: str) -> float:
    """The metric of the 'last' epoch, the 'best' one, or its 'mean' over all epochs."""
    if of == 'mean':
        return statistics.fmean(map(float, result.metrics.split()))
    return result.last if of == 'last' else result.best


def claim_rows(plan: Plan, results: Sequence[Result]) -> list[list[str]]:
    """One line per claim, as :data:`CLAIMS`."""
    rows = []
    for claim in plan.claims:
        ours, theirs = (
            {seed: value(result, claim.of) for seed, result in done_of(results, name).items()}
            for name in (claim.variant, claim.than)
        )
        found = paired_difference(ours, theirs)
        cells = ['not run', '', '', '0', '']
        if found:
            intervals = [f'{low:+.2f} to {high:+.2f}' if low is not None else 'none' for low, high in (
                found.interval or (None, None), found.bootstrap or (None, None),
            )]  # fmt: skip
            cells = [f'{found.mean:+.2f}', *intervals, str(found.pairs), found.verdict(claim.printed)]
        printed = 'more' if claim.printed == 1 else 'less' if claim.printed == -1 else f'{claim.printed:+g}'
        rows.append([f'{claim.source}: {claim.says}', printed, *cells])
    return rows


def variant_rows(plan: Plan, results: Sequence[Result]) -> list[list[str]]:
    """One line per variant, as :data:`VARIANTS`: means with standard deviations over the seeds."""
    rows = []
    for name in plan.variants:
        done = done_of(results, name).values()
        failed = sum(result.variant == name and result.status != DONE for result in results)
        count = f'{len(done)} of {plan.seeds}' + (f', {failed} failed' if failed else '')
        if not done:
            rows.append([name, '', '', '', count, ''])
            continue
        spread = [mean_and_deviation([value(result, of) for result in done]) for of in ('last', 'best', 'mean')]
        whole = [result.seconds for result in done if not result.resumed]
        rows.append([name, *spread, count, f'{statistics.fmean(whole) / 60:.1f}' if whole else ''])
    return rows


def mean_and_deviation(values: Sequence[float]) -> str:
    """'71.20 ± 0.31'; no deviation of one value."""
    return f'{statistics.fmean(values):.2f}' + (f' ± {statistics.stdev(values):.2f}' if len(values) > 1 else '')


def draw(plan: Plan, results: Sequence[Result]) -> Figure:
    """Loss and metric over epochs; a line is the mean over the seeds, the band one standard deviation."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.6), layout='constrained')
    for axis, column, label in zip(figure.subplots(1, 2), ('losses', 'metrics'), ('training loss', plan.metric)):
        for i, name in enumerate(plan.variants):
            lists = [list(map(float, getattr(result, column).split())) for result in done_of(results, name).values()]
            if not lists:
                continue
            curves = [Curve(np.arange(1, len(one) + 1), np.zeros(len(one)), np.array(one)) for one in lists]
            epochs, mean, spread = mean_and_spread(curves, 'steps')
            axis.plot(epochs, mean, color=f'C{i % 10}', label=f'{name}, {len(curves)} seeds', marker='o', markersize=3)
            axis.fill_between(epochs, mean - spread, mean + spread, color=f'C{i % 10}', alpha=0.2, linewidth=0)
        axis.set(xlabel='epoch', ylabel=label)
        axis.grid(alpha=0.3)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc='outside upper center', ncols=4, frameon=False)
    return figure
