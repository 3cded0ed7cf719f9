"""The 95 % interval that goes with every score; for an accuracy, Wilson's score interval."""

import math
from typing import NamedTuple

Z95 = 1.959963984540054  # the normal distribution's 97.5 % point


class Interval(NamedTuple):
    """A confidence interval; of a proportion, both ends lie within [0, 1]."""

    low: float
    high: float


class Metric(NamedTuple):
    """A score of a whole set of items, and its 95 % interval; both in the score's own unit."""

    value: float
    interval: Interval


def wilson_interval(correct: int, total: int, z: float = Z95) -> Interval:
    """Interval for the proportion behind `correct` successes in `total` independent trials.

    Unlike p ± z·sqrt(p(1−p)/n), it stays inside [0, 1], is not empty at 0 or `total` successes, and covers well for
    the few hundred items an evaluation here often has.

    Args:
        correct: Number of successes, 0 ≤ correct ≤ total.
        total: Number of trials, at least 1.
        z: Normal quantile of the wanted coverage; the default gives 95 %.

    Raises:
        ValueError: If the counts do not describe a proportion.

    Source: Wilson, "Probable inference, the law of succession, and statistical inference" (1927).
    """
    if not 0 <= correct <= total or total < 1:
        raise ValueError(f"an interval needs 0 <= correct <= total and total >= 1, got {correct} of {total}")
    p, z2 = correct / total, z * z
    centre = (p + z2 / (2 * total)) / (1 + z2 / total)
    half = z / (1 + z2 / total) * math.sqrt(p * (1 - p) / total + z2 / (4 * total * total))
    # At 0 and at `total` successes one end is exactly 0 or 1; rounding must not push it past.
    low = 0.0 if correct == 0 else centre - half
    high = 1.0 if correct == total else centre + half
    return Interval(low, high)
