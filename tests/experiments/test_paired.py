"""Differences of pairs, against scipy's own test and figures worked out by hand."""

import numpy as np
import pytest
from scipy import stats

from bnet_mm.experiments.paired import paired_difference


def test_interval_by_hand():
    """Differences 1, 2, 3: mean 2, deviation 1, t(0.975, 2) = 4.3027, half 4.3027 / sqrt(3) = 2.4841."""
    found = paired_difference({0: 11.0, 1: 22.0, 2: 33.0}, {0: 10.0, 1: 20.0, 2: 30.0})
    assert (found.mean, found.pairs) == (2.0, 3)
    assert found.interval == pytest.approx((2 - 2.4841, 2 + 2.4841), abs=1e-4)
    assert found.bootstrap == (1.0, 3.0)  # a resample of three equal ones has a chance of 1 / 27, above 2.5 %


def test_interval_is_that_of_the_paired_test():
    rng = np.random.default_rng(0)
    ours, theirs = rng.normal(70, 1, 8), rng.normal(69, 1, 8)
    found = paired_difference(dict(enumerate(ours)), dict(enumerate(theirs)))
    expected = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    assert found.interval == pytest.approx((expected.low, expected.high))


def test_only_seeds_of_both_count():
    found = paired_difference({0: 5.0, 1: 7.0, 2: 100.0}, {1: 4.0, 0: 4.0, 3: -100.0})
    assert (found.mean, found.pairs) == (2.0, 2)
    assert paired_difference({0: 1.0}, {1: 1.0}) is None


def test_one_pair_has_no_interval():
    found = paired_difference({0: 5.0}, {0: 4.0})
    assert found.interval is None and found.bootstrap is None
    assert found.verdict(1.0) == 'one pair says nothing'


@pytest.mark.parametrize(
    'differences, printed, verdict',
    [
        ((1.0, 1.1, 0.9), 0.5, 'confirmed here'),
        ((1.0, 1.1, 0.9), -0.5, 'contradicted here'),
        ((-1.0, -1.1, -0.9), -0.5, 'confirmed here'),
        ((-1.0, -1.1, -0.9), 0.5, 'contradicted here'),
        ((1.0, -1.1, 0.9), 0.5, 'not visible at this size'),
    ],
)
def test_verdict(differences, printed, verdict):
    found = paired_difference(dict(enumerate(differences)), dict.fromkeys(range(3), 0.0))
    assert found.verdict(printed) == verdict
