"""Macro and micro averages, and that their intervals cover what they should."""

import random

import pytest

from svdtune.evaluation.averages import average, average_json
from svdtune.evaluation.interval import wilson_interval

# SARA on LLaMA-7B, Table 1: the held-out sets' sizes and the right answers behind its percentages.
TABLE_1 = {
    "svamp": (120, 200),
    "aqua": (18, 51),
    "addsub": (63, 79),
    "multiarith": (98, 110),
    "singleeq": (86, 102),
    "gsm8k_sara": (65, 264),
}


def test_the_papers_average_is_the_macro_average() -> None:
    found = average(TABLE_1)
    assert round(100 * found.macro, 2) == 62.18
    assert (found.correct, found.n) == (450, 806)
    assert found.micro == 450 / 806
    assert found.micro_interval == wilson_interval(450, 806)
    assert found.macro_interval.low < found.macro < found.macro_interval.high


def test_one_set_is_its_own_average() -> None:
    found = average({"a": (3, 10)})
    assert found.macro == found.micro == 0.3
    assert found.macro_interval == pytest.approx(wilson_interval(3, 10))


def test_intervals_stay_within_0_and_1() -> None:
    for counts in ({"a": (0, 5), "b": (0, 9)}, {"a": (5, 5), "b": (9, 9)}, {"a": (0, 5), "b": (9, 9)}):
        low, high = average(counts).macro_interval
        assert 0 <= low < high <= 1


def test_the_macro_interval_covers_the_mean_in_about_95_of_100_draws() -> None:
    draw = random.Random(0)
    truth = {"a": (0.6, 200), "b": (0.3, 51), "c": (0.9, 110)}
    mean, covered = sum(p for p, _ in truth.values()) / 3, 0
    for _ in range(2000):
        counts = {name: (sum(draw.random() < p for _ in range(n)), n) for name, (p, n) in truth.items()}
        low, high = average(counts).macro_interval
        covered += low <= mean <= high
    assert 0.93 < covered / 2000 < 0.97


def test_json() -> None:
    found = average_json(average({"a": (1, 2), "b": (1, 4)}))
    assert (found["macro"]["accuracy"], found["micro"]["accuracy"], found["n"]) == (0.375, 2 / 6, 6)


def test_no_set() -> None:
    with pytest.raises(ValueError, match="at least one data set"):
        average({})
