"""The 95 % interval that goes with every score: Wilson's for an accuracy, a bootstrap interval for
other means; pass@k.

They are written out because the core does without scipy (1.17.1: 140 MB, 0.7 to 1.9 s to import).
`scipy.stats.binomtest(...).proportion_ci(method="wilson")` gives Wilson's interval within the last
bit, in 1 ms against 4 µs. `scipy.stats.bootstrap` draws other samples, which moves the ends in
their third digit, and takes as long. Tests hold both to scipy.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES = 1000
PASS_AT = (1, 10, 100)  # the k that are reported, as far as there are so many samples
Z95 = 1.959963984540054  # the normal distribution's 97.5 % point


class Interval(NamedTuple):
    """A confidence interval; of a proportion, both ends lie within [0, 1]."""

    low: float
    high: float


class Metric(NamedTuple):
    """A score of a whole set of items, and its 95 % interval; both in the score's own unit."""

    value: float
    interval: Interval


def wilson_interval(correct: int, total: int) -> Interval:
    """95 % interval for the proportion behind `correct` successes in `total` independent trials.

    Unlike p ± z·sqrt(p(1−p)/n), it stays inside [0, 1], is not empty at 0 or `total` successes, and
    covers well for the few hundred items an evaluation here often has.

    Args:
        correct: Number of successes, 0 ≤ correct ≤ total.
        total: Number of trials, at least 1.

    Raises:
        ValueError: If the counts do not describe a proportion.

    Source: Wilson, "Probable inference, the law of succession, and statistical inference" (1927).
    """
    if not 0 <= correct <= total or total < 1:
        raise ValueError(f"an interval needs 0 <= correct <= total and total >= 1, got {correct} of {total}")
    p, z2 = correct / total, Z95**2
    centre = (p + z2 / (2 * total)) / (1 + z2 / total)
    half = Z95 / (1 + z2 / total) * math.sqrt(p * (1 - p) / total + z2 / (4 * total * total))
    # At 0 and at `total` successes one end is exactly 0 or 1; rounding must not push it past.
    low = 0.0 if correct == 0 else centre - half
    high = 1.0 if correct == total else centre + half
    return Interval(low, high)


def bootstrap(counts: np.ndarray, score: Callable[[np.ndarray], np.ndarray]) -> Metric:
    """A score of all items, and its percentile interval over samples of them drawn with
    replacement.

    Args:
        counts: Shape (items, …), rows that may be summed.
        score: Takes sums of rows, shape (..., …), to scores, shape (...).
    """
    items = len(counts)
    drawn = np.random.default_rng(0).multinomial(items, np.full(items, 1 / items), size=RESAMPLES)
    low, high = np.percentile(score(drawn @ counts), [2.5, 97.5])
    return Metric(float(score(counts.sum(axis=0))), Interval(float(low), float(high)))


def bootstrap_mean(values: Sequence[float]) -> Metric:
    """The mean over items and its bootstrap interval."""
    return bootstrap(np.array([[value, 1.0] for value in values]), lambda sums: sums[..., 0] / sums[..., 1])


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """The chance that at least one of k samples is right, estimated without bias from `samples` of
    which `correct` are.

    1 − C(samples − correct, k) / C(samples, k); the plain 1 − (1 − correct/samples)^k is too small.

    Source: Chen et al., "Evaluating large language models trained on code" (2021), Eq. 1.
    """
    return 1 - math.comb(samples - correct, k) / math.comb(samples, k)


def pass_at(verdicts: Sequence[Sequence[bool]]) -> dict[str, Metric]:
    """pass@1, pass@10 and pass@100 as far as there are so many samples, and pass@n of all n: means
    over the items.

    Args:
        verdicts: For each item, whether each of its n samples is right.
    """
    n = len(verdicts[0])
    found = {}
    for k in sorted({k for k in PASS_AT if k < n} | {n} | {1}):
        values = [pass_at_k(n, sum(item), k) for item in verdicts]
        found[f"pass@{k}"] = bootstrap_mean(values)
    if n == 1:
        right = sum(map(sum, verdicts))
        found["pass@1"] = Metric(right / len(verdicts), wilson_interval(right, len(verdicts)))
    return found
