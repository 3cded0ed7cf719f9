"""The interval over seeds and items: it covers what it says, and is scipy's where one of the two is
all there is."""

import numpy as np
import pytest
from scipy import stats

from svdtune.lab.study.crossed_effects import crossed


def drawn(draw: np.random.Generator, seeds: tuple[int, int], n: int, of_seed: float, of_item: float, left: float):
    """Two arms without a difference: [seeds, items] each, items shared, each arm with its own way
    with them."""
    shared = 3 * draw.normal(size=n)
    return [
        of_seed * draw.normal(size=(s, 1)) + shared + of_item * draw.normal(size=n) + left * draw.normal(size=(s, n))
        for s in seeds
    ]


CASES = {
    "both": ((3, 3), 60, 0.1, 0.5, 0.5),
    "seeds": ((3, 5), 60, 0.5, 0.01, 0.5),
    "items": ((3, 3), 40, 0.001, 0.5, 0.2),
    "rest": ((5, 5), 60, 0.001, 0.001, 1.0),
}


@pytest.mark.parametrize("case", CASES)
def test_the_interval_covers_no_difference_as_often_as_it_says(case: str) -> None:
    draw = np.random.default_rng(0)
    found = [crossed(*drawn(draw, *CASES[case])) for _ in range(600)]
    covered = np.mean([one.interval.low <= 0 <= one.interval.high for one in found])
    assert covered >= 0.93, "95 %, less what 600 draws may miss; where one part is all, it is cautious"
    assert covered <= (0.97 if case in ("seeds", "items") else 0.995)
    assert np.mean([one.p < 0.05 for one in found]) == pytest.approx(1 - covered)


@pytest.mark.parametrize("case", ["both", "seeds", "items"])
def test_a_difference_as_large_as_could_be_seen_is_seen_four_times_in_five(case: str) -> None:
    draw = np.random.default_rng(1)
    least = np.median([crossed(*drawn(draw, *CASES[case])).least() for _ in range(300)])
    seen = []
    for _ in range(600):
        arm, baseline = drawn(draw, *CASES[case])
        seen.append(crossed(arm + least, baseline).p < 0.05)
    assert 0.7 < np.mean(seen) < 0.9


def test_with_one_number_a_run_it_is_students_pooled_test() -> None:
    a, b = np.array([1.0, 1.3, 0.9]), np.array([1.4, 1.6, 1.5, 1.2])
    found, test = crossed(a[:, None], b[:, None]), stats.ttest_ind(a, b)
    assert found.p == pytest.approx(test.pvalue)
    assert found.interval == pytest.approx(test.confidence_interval(0.95))


def test_with_one_seed_it_is_the_paired_test_over_items() -> None:
    draw = np.random.default_rng(2)
    a, b = draw.normal(size=(2, 1, 30))
    found, test = crossed(a, b), stats.ttest_rel(a[0], b[0])
    assert found.p == pytest.approx(test.pvalue)
    assert found.interval == pytest.approx(test.confidence_interval(0.95))


def test_a_mean_alone_is_students() -> None:
    values = np.array([[1.0], [1.2], [1.5]])
    found = crossed(values)
    assert found.interval == pytest.approx(stats.ttest_1samp(values[:, 0], 0).confidence_interval(0.95))


@pytest.mark.parametrize(("value", "margin", "alike"), [(0.0, 0.5, True), (0.46, 0.5, False), (2.0, 0.5, False)])
def test_alike_is_two_one_sided_tests(value: float, margin: float, alike: bool) -> None:
    draw = np.random.default_rng(3)
    a, b = draw.normal(size=(2, 1, 400)) * 0.5
    a += value - (a.mean() - b.mean())
    found = crossed(a, b)
    difference = (a - b)[0]
    below = stats.ttest_1samp(difference, -margin, alternative="greater").pvalue
    above = stats.ttest_1samp(difference, margin, alternative="less").pvalue
    assert found.alike(margin) == pytest.approx(max(below, above))
    assert (found.alike(margin) < 0.05) == alike


def test_nothing_is_known_of_numbers_that_do_not_vary() -> None:
    found = crossed(np.ones((3, 4)), np.zeros((3, 4)))
    assert (found.value, found.interval, found.p, found.least(), found.alike(2.0)) == (1.0, None, None, None, None)
    with pytest.raises(ValueError, match="expected the same items of both arms; got \\[4, 5\\]"):
        crossed(np.ones((3, 4)), np.ones((3, 5)))
