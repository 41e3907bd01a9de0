"""Differences of two ways to train, seed by seed."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Difference:
    """The mean of paired differences with two 95 % intervals; None where one pair allows none.

    interval: Of Student's t over the pairs.
    bootstrap: Percentiles of 10,000 means of resampled pairs, seeded. With few pairs it is too narrow.
    """

    mean: float
    pairs: int
    interval: tuple[float, float] | None
    bootstrap: tuple[float, float] | None

    def verdict(self, printed: float) -> str:
        """What the interval of t says of a printed difference, of which only the sign is compared."""
        if self.interval is None:
            return 'one pair says nothing'
        low, high = self.interval
        if low <= 0 <= high:
            return 'not visible at this size'
        return 'confirmed here' if (self.mean > 0) == (printed > 0) else 'contradicted here'


def paired_difference(values: Mapping[int, float], reference: Mapping[int, float]) -> Difference | None:
    """The difference of two metrics by seed, over the seeds that both have; None if there is none."""
    from scipy import stats

    seeds = sorted(values.keys() & reference.keys())
    differences = [values[seed] - reference[seed] for seed in seeds]
    if not differences:
        return None
    mean = statistics.fmean(differences)
    if len(differences) == 1:
        return Difference(mean, 1, None, None)
    error = statistics.stdev(differences) / len(differences) ** 0.5
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(differences) - 1)) * error
    drawn = stats.bootstrap(
        (differences,), statistics.fmean, n_resamples=10000, vectorized=False, confidence_level=CONFIDENCE,
        method='percentile', rng=0,
    ).confidence_interval  # fmt: skip
    return Difference(mean, len(differences), (mean - half, mean + half), (float(drawn.low), float(drawn.high)))
