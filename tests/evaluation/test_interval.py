"""Wilson's interval against its defining equation and published values; bootstrap intervals;
pass@k."""

import math
from itertools import combinations

import numpy as np
import pytest
from scipy import stats

from svdtune.evaluation import wilson_interval
from svdtune.evaluation.interval import Z95, Metric, bootstrap, pass_at, pass_at_k


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


def test_it_is_scipys() -> None:
    for total in (1, 2, 51, 264, 1319, 10_042):
        for correct in {0, 1, total // 3, total // 2, total - 1, total}:
            expected = stats.binomtest(correct, total).proportion_ci(method="wilson")
            assert wilson_interval(correct, total) == pytest.approx((expected.low, expected.high), abs=1e-15)


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


def test_bootstrap_covers_the_score_and_is_repeatable():
    counts = np.stack([np.arange(50.0), np.ones(50)], axis=1)
    metric = bootstrap(counts, lambda sums: sums[..., 0] / sums[..., 1])
    assert metric.value == 24.5
    # The mean of 50 numbers with a standard deviation of 14.4
    assert metric.interval == pytest.approx((24.5 - 4, 24.5 + 4), abs=0.5)
    assert metric == bootstrap(counts, lambda sums: sums[..., 0] / sums[..., 1])


def test_the_bootstrap_comes_near_scipys_of_more_samples() -> None:
    draw = np.random.default_rng(1)
    counts = np.stack([draw.random(300), draw.random(300) + 1], axis=1)

    def ratio(sums: np.ndarray) -> np.ndarray:
        return sums[..., 0] / sums[..., 1]

    expected = stats.bootstrap(
        (np.arange(300),),
        lambda rows, axis: ratio(counts[rows].sum(-2)),
        n_resamples=20_000,
        method="percentile",
        random_state=np.random.default_rng(0),
    ).confidence_interval
    width = expected.high - expected.low
    assert bootstrap(counts, ratio).interval == pytest.approx((expected.low, expected.high), abs=width / 15)


def test_pass_at_k_is_the_share_of_choices_that_hold_a_right_one() -> None:
    for samples, correct, k in [(5, 2, 1), (5, 2, 3), (5, 0, 2), (5, 5, 2), (7, 3, 5), (10, 1, 10)]:
        right = [place < correct for place in range(samples)]
        chosen = [any(choice) for choice in combinations(right, k)]
        assert pass_at_k(samples, correct, k) == pytest.approx(sum(chosen) / len(chosen))


def test_pass_at_k_of_a_set_is_the_mean_over_its_problems() -> None:
    verdicts = [[True] * 12, [False] * 12, [True] * 3 + [False] * 9, [False] * 11 + [True]]
    metrics = pass_at(verdicts)
    assert list(metrics) == ["pass@1", "pass@10", "pass@12"]
    assert metrics["pass@1"].value == pytest.approx((1 + 0 + 3 / 12 + 1 / 12) / 4)
    assert metrics["pass@10"].value == pytest.approx((1 + 0 + 1 + (1 - 11 / 66)) / 4)
    assert metrics["pass@12"].value == 0.75
    for metric in metrics.values():
        assert 0 <= metric.interval.low < metric.value < metric.interval.high <= 1
    assert pass_at([[True], [False]]) == {"pass@1": Metric(0.5, wilson_interval(1, 2))}
