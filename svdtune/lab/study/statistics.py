"""How sure a score and a difference are: over seeds (the chance in training) and over items (the
chance in the test set).

The two are different questions. Over seeds: would another initialisation and data order say the
same, on these very items? Over items: would other items of the same kind say the same, of these
very trained models? Neither interval covers the other's part.

Student's distribution and the paired test are scipy's. Two are written out, and tests hold them to
the libraries:

- the sign-flip test. `scipy.stats.permutation_test` flips item by item, so it is exact up to some
  twenty items; taken together by size, a thousand items that are right or wrong are still exact.
  Where both draw, as on the 60 comparisons of docs/results (772 to 8,585 items), 99,999 outcomes
  take 4.7 s there for 772 items, and 0.2 s here on average over all 60. Of ten compared, scipy's p
  by 9,999 outcomes differs by up to 0.011.
- Holm's correction. statsmodels' `multipletests` gives the same bits on all 22 tables, and would
  bring 67 MB and pandas, 0.6 s to import and 0.09 s a call for what takes 10 µs in nine lines.

(One thread of an x86-64 processor, scipy 1.17.1, statsmodels 0.15.0.)
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import numpy as np

from svdtune.evaluation.interval import Z95, Interval, wilson_interval
from svdtune.system import needs


class Chance(NamedTuple):
    """What comes without reading the questions of a set that offers a few answers to each.

    Attributes:
        guessed: The share that guessing has right.
        right: How many the one answer has right that is right most often; 0 where nobody counted.
        n: Of how many items, so that another split or a part is not measured by it.
    """

    guessed: float
    right: int = 0
    n: int = 0

    def best(self, n: int) -> float:
        """The share that can be had in n items: by one answer to all where these are the items
        counted, else by guessing."""
        return self.right / n if self.right and n == self.n else self.guessed


CHANCE = {
    "aqua": Chance(1 / 5, 16, 51),  # SARA's held-out questions
    "arc_challenge": Chance(1 / 4, 311, 1172),
    "arc_easy": Chance(1 / 4, 633, 2376),
    "boolq": Chance(1 / 2, 2033, 3270),
    "hellaswag": Chance(1 / 4),
    "openbookqa": Chance(1 / 4, 138, 500),
    "piqa": Chance(1 / 2, 928, 1838),
    "siqa": Chance(1 / 3, 657, 1954),
    "winogrande": Chance(1 / 2, 639, 1267),
}
LEVEL = 0.05  # of every test
_EXACT = 1_000_000  # outcomes of a permutation test that are still enumerated
_DRAWS = 99_999
_SAME = 1e-12  # scores nearer than this are one score, but for rounding


@dataclass(frozen=True)
class Spread:
    """A score over seeds.

    Attributes:
        mean: Its mean.
        sd: The sample standard deviation (n − 1 in the denominator); None for one seed.
        interval: Student's 95 % interval of the mean; None for one seed, and where all scores are
            one.
    """

    mean: float
    sd: float | None
    interval: Interval | None


@dataclass(frozen=True)
class Difference:
    """A difference of two arms' scores.

    Attributes:
        value: Arm less baseline.
        interval: Its 95 % interval; None where it is not known.
        p: Two-sided p of no difference; None where it is not known.
        n: How many pairs, of seeds or of items.
    """

    value: float
    interval: Interval | None
    p: float | None
    n: int


def spread(values: Sequence[float]) -> Spread:
    """Mean, standard deviation and Student's 95 % interval of at least one value.

    Covers the randomness of training; the test set is taken as given.
    """
    mean, n = float(np.mean(values)), len(values)
    if n == 1:
        return Spread(mean, None, None)
    sd = float(np.std(values, ddof=1))
    if np.ptp(values) <= _SAME:
        return Spread(mean, 0.0, None)
    half = float(stats().t.ppf(0.975, n - 1)) * sd / math.sqrt(n)
    return Spread(mean, sd, Interval(mean - half, mean + half))


def over_seeds(arm: Mapping[int, float], baseline: Mapping[int, float]) -> Difference | None:
    """Paired t-test over the seeds that both have; None if there is no such seed.

    Covers the randomness of training: initialisation, data order, and whatever else a seed decides.
    The test set is taken as given. With few seeds it assumes normal differences and sees only large
    ones.
    """
    seeds = sorted(arm.keys() & baseline.keys())
    if not seeds:
        return None
    ours, theirs = [arm[seed] for seed in seeds], [baseline[seed] for seed in seeds]
    value = float(np.mean(ours) - np.mean(theirs))
    differences = np.subtract(ours, theirs)
    # Without any variation (one seed among it) there is nothing to measure the difference by.
    if np.ptp(differences) <= _SAME:
        return Difference(value, None, None, len(seeds))
    test = stats().ttest_rel(ours, theirs)
    low, high = test.confidence_interval(0.95)
    return Difference(value, Interval(float(low), float(high)), float(test.pvalue), len(seeds))


def over_items(arm: Mapping[str, np.ndarray], baseline: Mapping[str, np.ndarray]) -> Difference:
    """Sign-flip permutation test over items of the difference of the mean of the sets' scores, and
    its interval.

    Covers the sampling of the test set: items are taken as drawn, set by set, the trained models as
    given. Exact where there are at most a million outcomes, else by 99,999 drawn ones. The interval
    is normal, of the variances within the sets.

    Args:
        arm: For each set, the share of seeds that have each item right, shape [items].
        baseline: Likewise, of the same sets and items, in the same order.
    """
    differences = [np.asarray(arm[name], float) - baseline[name] for name in arm]
    sets = len(differences)
    value = float(np.mean([one.mean() for one in differences]))
    p = _sign_flip([one / len(one) for one in differences])
    n = sum(map(len, differences))
    if min(map(len, differences)) < 2 or max(map(np.ptp, differences)) <= _SAME:
        return Difference(value, None, p, n)
    half = Z95 * math.sqrt(sum(one.var(ddof=1) / len(one) for one in differences)) / sets
    return Difference(value, Interval(value - half, value + half), p, n)


def _sign_flip(parts: Sequence[np.ndarray]) -> float:
    """The chance of a sum as far from zero, were the sign of each summand a coin's.

    Summands of one size m are as good as each other: c of them add up to m (2B − c), B from a
    binomial distribution.
    """
    # what should be one size is, whatever arithmetic it came from
    summands = np.round(np.concatenate(parts), 12)
    sizes, counts = np.unique(np.abs(summands), return_counts=True)
    sizes, counts = sizes[sizes > 0], counts[sizes > 0]
    observed = abs(summands.sum()) - 1e-9  # sums that are equal but for rounding are as far
    if np.prod(counts + 1.0) > _EXACT:
        flipped = np.random.default_rng(0).binomial(counts, 0.5, size=(_DRAWS, len(counts)))
        as_far = np.abs((2 * flipped - counts) @ sizes) >= observed
        return float((1 + as_far.sum()) / (1 + _DRAWS))  # the observed one is an outcome, too
    sums, chances = np.zeros(1), np.ones(1)
    for size, count in zip(sizes, counts, strict=True):
        right = np.arange(count + 1)
        sums = np.add.outer(sums, size * (2 * right - count)).ravel()
        chances = np.multiply.outer(chances, stats().binom.pmf(right, count, 0.5)).ravel()
    return min(1.0, float(chances[np.abs(sums) >= observed].sum()))


def holm(ps: Sequence[float | None]) -> list[float | None]:
    """p values corrected for being several; what is None stays so and does not count.

    Source: Holm, "A simple sequentially rejective multiple test procedure" (1979).
    """
    known = sorted((p, at) for at, p in enumerate(ps) if p is not None)
    corrected: list[float | None] = [None] * len(ps)
    largest = 0.0
    for rank, (p, at) in enumerate(known):
        largest = max(largest, min(1.0, p * (len(known) - rank)))
        corrected[at] = largest
    return corrected


def holm_level(others: Sequence[float | None]) -> float:
    """The level at which Holm's correction tests one p beside these others: LEVEL divided by how
    many are not rejected before it, itself among them."""
    known = sorted(p for p in others if p is not None)
    for rank, p in enumerate(known):
        if p * (len(known) + 1 - rank) >= LEVEL:
            return LEVEL / (len(known) + 1 - rank)
    return LEVEL


def against_levels(score: Spread, n: int, lower: float, upper: float) -> int:
    """Whether a share of n items lies above two levels (1), below both (−1), or cannot be told from
    what lies between them (0).

    It lies off a level where both its interval over seeds and that over items (Wilson's, of the
    mean) do.
    """
    intervals = [wilson_interval(round(score.mean * n), n), *([score.interval] if score.interval else [])]
    if all(low > upper for low, _ in intervals):
        return 1
    return -1 if all(high < lower for _, high in intervals) else 0


def stats() -> ModuleType:
    """scipy.stats.

    Raises:
        SvdtuneError: scipy is not installed.
    """
    with needs("a study's statistics need scipy", "study"):
        from scipy import stats
    return stats
