"""Training curves of any number of runs (paper, Figures 2 and 3)."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bnet_mm.visualization.runs import Curve, Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def lr_drops(curve: Curve) -> list[int]:
    """Iterations at which the learning rate steps down to half or less, from one plateau to the next."""
    lr = curve.values
    flat = np.isclose(lr[1:], lr[:-1])
    halved = lr[1:] <= lr[:-1] / 2
    inner = range(1, len(lr) - 1)
    return [int(curve.steps[i]) for i in inner if halved[i - 1] and (i < 2 or flat[i - 2]) and flat[i]]


def mean_and_spread(curves: list[Curve], over: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Positions that all curves reach, the mean there, and the standard deviation over the curves (0 for one).

    Args:
        over: 'steps' or 'seconds'.
    """
    curves = [curve for curve in curves if len(curve.steps)]
    if not curves:
        return np.array([]), np.array([]), np.array([])
    axes = [getattr(curve, over) for curve in curves]
    grid = np.unique(np.concatenate(axes))
    grid = grid[(grid >= max(axis[0] for axis in axes)) & (grid <= min(axis[-1] for axis in axes))]
    values = np.stack([np.interp(grid, axis, curve.values) for axis, curve in zip(axes, curves)])
    return grid, values.mean(0), values.std(0, ddof=1) if len(curves) > 1 else np.zeros(len(grid))


def draw_curves(groups: dict[str, list[Run]], metric: str | None) -> Figure:
    """Loss and metric, over iterations and over hours of training.

    A line is the mean over the seeds of a recipe, the band around it their standard deviation; dotted lines are drops
    of the learning rate.
    """
    from matplotlib.figure import Figure

    kinds = ['loss', metric] if metric else ['loss']
    figure = Figure(figsize=(10, 3.3 * len(kinds)), layout='constrained')
    for row, kind in zip(figure.subplots(len(kinds), 2, squeeze=False), kinds):
        for axis, over, scale in zip(row, ('steps', 'seconds'), (1, 3600)):
            for i, (name, runs) in enumerate(groups.items()):
                curves = [run.loss() if kind == 'loss' else run.metric(kind) for run in runs]
                x, mean, spread = mean_and_spread(curves, over)
                label = name if len(runs) == 1 else f'{name}, {len(runs)} seeds'
                colour = f'C{i % 10}'
                axis.plot(
                    x / scale, mean, color=colour, label=label, marker='' if kind == 'loss' else 'o', markersize=3
                )
                axis.fill_between(x / scale, mean - spread, mean + spread, color=colour, alpha=0.2, linewidth=0)
                if over == 'steps':
                    for step in lr_drops(runs[0].learning_rate()):
                        axis.axvline(step, color=colour, linestyle=':', linewidth=0.8)
            axis.set(xlabel='iteration' if over == 'steps' else 'hours of training', ylabel=kind)
            axis.grid(alpha=0.3)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc='outside upper center', ncols=2, frameon=False)
    return figure


def write_csv(groups: dict[str, list[Run]], metrics: list[str], path: Path) -> None:
    """All points of loss, learning rate and metrics: group, folder, seed, kind, iteration, seconds, value."""
    with open(path, 'w', newline='') as file:
        writer = csv.writer(file)
        writer.writerow(['config', 'folder', 'seed', 'kind', 'iteration', 'seconds', 'value'])
        for name, runs in groups.items():
            for run in runs:
                kinds = {'loss': run.loss(), 'lr': run.learning_rate(), **{m: run.metric(m) for m in metrics}}
                for kind, curve in kinds.items():
                    for point in zip(curve.steps, curve.seconds, curve.values):
                        writer.writerow([name, run.folder, run.seed, kind, *(float(value) for value in point)])
