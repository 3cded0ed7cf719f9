"""Wilson's interval against its defining equation and published values."""

import math

import pytest

from svdtune.evaluation import wilson_interval
from svdtune.evaluation.interval import Z95


@pytest.mark.parametrize(("correct", "total"), [(1, 3), (5, 10), (81, 263), (15, 148), (56, 20_000)])
def test_both_ends_solve_the_defining_equation(correct: int, total: int) -> None:
    """An end p is where the observed share lies z standard deviations of p away."""
    observed = correct / total
    for end in wilson_interval(correct, total):
        assert abs(observed - end) == pytest.approx(Z95 * math.sqrt(end * (1 - end) / total), rel=1e-9)


def test_published_example() -> None:
    """Newcombe (1998), table I, method 3: 81 of 263 gives 0.2553 to 0.3662."""
    low, high = wilson_interval(81, 263)
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)


@pytest.mark.parametrize("total", [1, 7, 250])
def test_all_or_nothing_ends_at_the_edge_and_is_not_empty(total: int) -> None:
    nothing, everything = wilson_interval(0, total), wilson_interval(total, total)
    assert nothing.low == 0
    assert 0 < nothing.high < 1
    assert everything.high == 1
    assert everything.low == pytest.approx(1 - nothing.high)


@pytest.mark.parametrize(("correct", "total"), [(0, 0), (3, 2), (-1, 5)])
def test_counts_that_are_no_proportion_are_refused(correct: int, total: int) -> None:
    with pytest.raises(ValueError, match="0 <= correct <= total"):
        wilson_interval(correct, total)
