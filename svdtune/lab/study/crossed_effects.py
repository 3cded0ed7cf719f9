"""How sure a difference of losses is where both the training and the items are drawn: one interval
over seeds and items, the smallest difference that it could have seen, and whether two arms are
alike in practice.

The model is one of crossed random effects: a run's loss on an item is the arm's mean, what the seed
does, what the item does, and what is left. Two arms meet the same items, so items are paired; their
seeds share nothing that is known (another start, another order), so seeds are not, and their
variance is pooled.
"""

import math
from dataclasses import dataclass

import numpy as np

from svdtune.evaluation.interval import Interval
from svdtune.lab.study.statistics import LEVEL, stats

_POWER = 0.8


@dataclass(frozen=True)
class Crossed:
    """A mean, or a difference of two.

    Attributes:
        value: the mean; of two arms, arm less baseline.
        error: its standard error; None where no variance can be had.
        df: Satterthwaite's degrees of freedom of the error.
        seeds: how many runs, of the arm and of the baseline.
    """

    value: float
    error: float | None
    df: float
    seeds: tuple[int, ...]

    @property
    def interval(self) -> Interval | None:
        """The 95 % interval, over seeds and items."""
        half = self._times(1 - LEVEL / 2)
        return None if half is None else Interval(self.value - half, self.value + half)

    @property
    def p(self) -> float | None:
        """Two-sided p of no difference; None without an error."""
        if not self.error:
            return None
        return float(2 * stats().t.sf(abs(self.value) / self.error, self.df))

    def least(self, level: float = LEVEL) -> float | None:
        """The smallest difference that a test at this level sees with 80 % power, given this
        error."""
        parts = self._times(1 - level / 2), self._times(_POWER)
        return None if parts[0] is None or parts[1] is None else parts[0] + parts[1]

    def alike(self, margin: float) -> float | None:
        """p of a difference of at least `margin` on either side: two one-sided tests (Schuirmann,
        1987)."""
        if not self.error:
            return None
        return float(stats().t.sf((margin - abs(self.value)) / self.error, self.df))

    def _times(self, level: float) -> float | None:
        """The error times a quantile of Student's distribution."""
        return None if self.error is None else float(stats().t.ppf(level, self.df)) * self.error


def crossed(arm: np.ndarray, baseline: np.ndarray | None = None) -> Crossed:
    """The mean of an arm's losses, or its difference to a baseline's.

    The variance is that of the seeds' means plus that of the items' means, less what both contain,
    the variance of what is left; never less than the larger of the two. With one seed only that of
    the items is known, with one item only that of the seeds.

    Args:
        arm: [seeds, items].
        baseline: [its seeds, the same items], or None.

    Raises:
        ValueError: the arms have not the same items.
    """
    arms = [np.asarray(one, float) for one in (arm, baseline) if one is not None]
    items = arms[0].shape[1]
    if any(one.shape[1] != items for one in arms):
        raise ValueError(f"expected the same items of both arms; got {[one.shape[1] for one in arms]}")
    signs = (1, -1)[: len(arms)]
    by_item = sum(sign * one.mean(0) for sign, one in zip(signs, arms, strict=True))
    value, seeds = float(np.mean(by_item)), tuple(map(len, arms))
    share = sum(1 / n for n in seeds)
    free = sum(n - 1 for n in seeds)
    over_items = float(np.var(by_item, ddof=1)) / items if items > 1 else 0.0
    over_seeds = left = 0.0
    if free:
        spread = sum(((one.mean(1) - one.mean()) ** 2).sum() for one in arms)
        over_seeds = float(spread) / free * share
    if free and items > 1:
        rest = sum(((one - one.mean(1, keepdims=True) - one.mean(0) + one.mean()) ** 2).sum() for one in arms)
        left = float(rest) / (free * (items - 1)) / items * share
    variance = max(over_items + over_seeds - left, over_items, over_seeds)
    if variance <= 0:
        return Crossed(value, None, math.inf, seeds)
    parts = [(over_items, items - 1), (over_seeds, free)]
    df = variance**2 / sum(part**2 / n for part, n in parts if part)
    return Crossed(value, math.sqrt(variance), df, seeds)
