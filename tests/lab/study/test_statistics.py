"""A study's statistics against published examples, and the quick sign-flip test against scipy's
permutation test."""

import sys
from collections import Counter

import numpy as np
import pytest
from scipy import stats

from svdtune.data import read_rows
from svdtune.errors import SvdtuneError
from svdtune.lab.study import statistics
from svdtune.lab.study.statistics import CHANCE, LEVEL, against_levels, holm, holm_level, over_items, over_seeds, spread

# Student's own data: hours of sleep gained by ten patients with two drugs (R's `sleep`).
FIRST = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
SECOND = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]


def test_mean_deviation_and_interval_of_seeds():
    found = spread([1, 2, 3, 4, 5])
    assert found.mean == 3
    assert found.sd == pytest.approx(1.58114, abs=1e-5)
    # t = 2.77645 with 4 degrees
    assert found.interval == pytest.approx((3 - 1.96324, 3 + 1.96324), abs=1e-5)


def test_one_seed_has_no_spread():
    found = spread([0.5])
    assert (found.mean, found.sd, found.interval) == (0.5, None, None)


def test_seeds_that_agree_have_no_interval():
    assert spread([0.1 + 0.2, 0.3]) == statistics.Spread(pytest.approx(0.3), 0.0, None)


def test_paired_t_test_of_students_example():
    found = over_seeds(dict(enumerate(FIRST)), dict(enumerate(SECOND)))
    assert found.value == pytest.approx(-1.58)
    assert found.p == pytest.approx(0.002833, abs=1e-6)
    assert found.interval == pytest.approx((-2.4598858, -0.7001142), abs=1e-6)


def test_only_common_seeds_are_paired():
    found = over_seeds({1: 0.5, 2: 0.7, 9: 0.0}, {2: 0.4, 1: 0.3, 8: 1.0})
    assert found.n == 2
    assert found.value == pytest.approx(0.25)
    assert over_seeds({1: 0.5}, {2: 0.5}) is None


@pytest.mark.parametrize("pairs", [({1: 0.5}, {1: 0.4}), ({1: 0.5, 2: 0.6}, {1: 0.4, 2: 0.5})])
def test_without_variation_there_is_a_difference_but_no_test(pairs):
    found = over_seeds(*pairs)
    assert found.value == pytest.approx(0.1)
    assert (found.interval, found.p) == (None, None)


def test_one_seed_on_one_set_is_the_exact_mcnemar_test():
    """12 items right in one arm alone, 3 in the other alone: 2 P(X ≤ 3), X of 15 coins, is 1152 /
    32768."""
    ours = np.array([True] * 12 + [False] * 3 + [True] * 40 + [False] * 45)
    theirs = np.array([False] * 12 + [True] * 3 + [True] * 40 + [False] * 45)
    found = over_items({"set": ours}, {"set": theirs})
    assert found.p == pytest.approx(1152 / 32768, rel=1e-12)
    assert found.value == pytest.approx(0.09)
    assert found.n == 100
    differences = ours.astype(float) - theirs
    assert found.interval == pytest.approx(stats.norm.interval(0.95, 0.09, stats.sem(differences)))


def test_several_sets_and_seeds_agree_with_scipys_exact_permutation_test():
    draw = np.random.default_rng(1)
    sizes = {"a": 5, "b": 8}
    ours = {name: draw.integers(0, 4, n) / 3 for name, n in sizes.items()}
    theirs = {name: draw.integers(0, 3, n) / 3 for name, n in sizes.items()}
    weighted = [np.concatenate([arm[name] / (n * 2) for name, n in sizes.items()]) for arm in (ours, theirs)]
    expected = stats.permutation_test(
        weighted, lambda x, y, axis: (x - y).sum(axis), permutation_type="samples", vectorized=True, n_resamples=np.inf
    )
    found = over_items(ours, theirs)
    assert found.p == pytest.approx(expected.pvalue, rel=1e-9)
    assert found.value == pytest.approx(expected.statistic)


def test_drawn_outcomes_come_near_the_exact_ones(monkeypatch):
    draw = np.random.default_rng(2)
    ours, theirs = {"a": draw.integers(0, 4, 60) / 3}, {"a": draw.integers(0, 4, 60) / 3}
    exact = over_items(ours, theirs).p
    monkeypatch.setattr(statistics, "_EXACT", 0)
    drawn = over_items(ours, theirs).p
    assert drawn != exact
    assert drawn == pytest.approx(exact, abs=5e-3)
    assert over_items(ours, theirs).p == drawn


def test_large_sets_are_compared_as_a_mean_of_sets():
    """A set of 40 weighs as much as one of 4,000."""
    small, large = np.zeros(40), np.zeros(4000)
    found = over_items({"s": small + 1, "l": large}, {"s": small, "l": large})
    assert found.value == pytest.approx(0.5)
    assert found.p == pytest.approx(2 / 2**40)


def test_arms_that_answer_alike_do_not_differ():
    same = {"a": np.array([1.0, 0.0, 1.0])}
    found = over_items(same, same)
    assert (found.value, found.interval, found.p) == (0, None, 1)


def test_a_set_of_one_item_has_a_p_but_no_interval():
    found = over_items({"a": np.array([1.0])}, {"a": np.array([0.0])})
    assert (found.p, found.interval) == (1, None)


def test_holms_correction():
    assert holm([0.01, 0.04, 0.03, 0.02]) == pytest.approx([0.04, 0.06, 0.06, 0.06])
    assert holm([None, 0.5, 0.02, None]) == [None, 0.5, 0.04, None]
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    # statsmodels 0.15.0: multipletests(ps, method="holm")[1]
    assert holm([0.01, 0.04, 0.03, 0.005, 0.5, 0.03]) == [0.05, 0.12, 0.12, 0.03, 0.5, 0.12]
    assert holm([]) == []


@pytest.mark.parametrize("others", [[], [0.5], [0.001], [0.001, 0.02, 0.5], [None, 0.02, 0.02], [0.2, 0.9, 0.3]])
def test_the_level_that_holms_correction_leaves_is_where_it_begins_to_reject(others):
    level = holm_level(others)
    assert holm([*others, level * 0.999])[-1] < LEVEL
    assert holm([*others, level * 1.001])[-1] >= LEVEL


@pytest.mark.parametrize(
    ("scores", "n", "side"),
    [
        ([0.28, 0.27, 0.29], 51, 0),  # seeds agree, but 51 items cannot tell 28 % from 20 %
        ([0.28, 0.27, 0.29], 5000, 1),
        ([0.05, 0.30, 0.40], 5000, 0),  # items would tell, but seeds do not agree
        ([0.05, 0.06, 0.05], 5000, -1),
        ([0.28], 5000, 1),
        ([0.28], 51, 0),
    ],
)
def test_off_a_level_only_where_seeds_and_items_both_say_so(scores, n, side):
    assert against_levels(spread(scores), n, 0.2, 0.2) == side


def test_between_two_levels_is_off_neither():
    assert [against_levels(spread([score]), 5000, 0.2, 0.3) for score in (0.1, 0.25, 0.4)] == [-1, 0, 1]


def test_what_one_answer_to_all_questions_comes_to(shared_data, monkeypatch):
    monkeypatch.setenv("SVDTUNE_DATA", str(shared_data))
    for name, chance in CHANCE.items():
        if chance.right:
            answers = Counter(row["answer"] for row in read_rows(name, split="unseen" if name == "aqua" else "test"))
            assert (chance.right, chance.n) == (max(answers.values()), answers.total())


def test_one_answer_is_a_level_for_the_items_it_was_counted_on():
    assert CHANCE["aqua"].best(51) == 16 / 51
    assert CHANCE["aqua"].best(254) == 1 / 5
    assert CHANCE["hellaswag"].best(10_042) == 1 / 4
    assert all(chance.guessed <= chance.best(chance.n) for chance in CHANCE.values())


def test_without_scipy_the_error_names_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(SvdtuneError, match=r"svdtune\[study\]"):
        spread([1, 2])
