"""Averages over several data sets: macro (of the sets' accuracies, as the papers' tables have it)
and micro (of all items)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from svdtune.data.catalogue import CATALOGUE
from svdtune.evaluation.interval import Interval, wilson_interval


@dataclass(frozen=True)
class Average:
    """Accuracies over several sets, with their 95 % intervals.

    Attributes:
        macro: The mean of the sets' accuracies: a set of 51 items weighs as much as one of 264.
        macro_interval: Its interval, of the sets' Wilson intervals.
        micro: The share of right answers among all items.
        micro_interval: Its Wilson interval.
        correct: How many answers are right.
        n: How many there are.
        sets: How many sets.
    """

    macro: float
    macro_interval: Interval
    micro: float
    micro_interval: Interval
    correct: int
    n: int
    sets: int


def average(counts: Mapping[str, tuple[int, int]]) -> Average:
    """Average over sets.

    The interval of the mean of K independent proportions pᵢ with intervals (lᵢ, uᵢ) adds their
    distances in squares: mean − √Σ(pᵢ − lᵢ)² / K to mean + √Σ(uᵢ − pᵢ)² / K.

    Args:
        counts: (right answers, answers) of each set, at least one set, by name.

    Raises:
        ValueError: If there is no set, or counts that describe no proportion.

    Source: Zou and Donner, "Construction of confidence limits about effect measures" (2008), for
    the interval.
    """
    if not counts:
        raise ValueError("an average needs at least one data set")
    shares = [correct / total for correct, total in counts.values() if total]
    intervals = [wilson_interval(correct, total) for correct, total in counts.values()]
    macro = sum(shares) / len(shares)
    below = math.sqrt(sum((share - interval.low) ** 2 for share, interval in zip(shares, intervals, strict=True)))
    above = math.sqrt(sum((interval.high - share) ** 2 for share, interval in zip(shares, intervals, strict=True)))
    correct, total = (sum(column) for column in zip(*counts.values(), strict=True))
    return Average(
        macro=macro,
        macro_interval=Interval(macro - below / len(shares), macro + above / len(shares)),
        micro=correct / total,
        micro_interval=wilson_interval(correct, total),
        correct=correct,
        n=total,
        sets=len(shares),
    )


def no_average(sets: Sequence[tuple[str, str]]) -> str | None:
    """Why scores have no common average; None where they have one.

    Scores are averaged where each set counts once and all are graded alike. Sets of the papers are
    alike as their tables average them, each graded by its own task.

    Args:
        sets: (where the rows come from, the task that graded) of each score.
    """
    sources = [source for source, _ in sets]
    if twice := sorted({source for source in sources if sources.count(source) > 1}):
        return f"{', '.join(twice)} is scored more than once, in parts or by several graders"
    as_papers = all(source in CATALOGUE and CATALOGUE[source].task == task for source, task in sets)
    tasks = sorted({task for _, task in sets})
    if len(tasks) > 1 and not as_papers:
        return f"the sets are graded differently, by {', '.join(tasks)}"
    return None


def average_json(found: Average) -> dict[str, Any]:
    """What `averages.json` has of an average."""
    return {
        "macro": {"accuracy": found.macro, "interval": found.macro_interval._asdict()},
        "micro": {"accuracy": found.micro, "interval": found.micro_interval._asdict()},
        "correct": found.correct,
        "n": found.n,
    }
