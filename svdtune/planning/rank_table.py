"""Ranks from spectra: at a given threshold, or at the largest threshold that a budget allows."""

import math
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from svdtune.errors import SvdtuneError
from svdtune.linalg import Spectrum
from svdtune.names import number_of

# How a layer's rank comes from its singular values s.
RULES = {
    "sara": "the least k whose k first s sum to the share θ of all (SARA, Algorithm 1)",
    "entropy": "θ times exp(−Σ p ln p), p = s / Σ s (Roy and Vetterli 2007), rounded up",
    "stable": "θ times Σ s² / s₁² (Rudelson and Vershynin 2007), rounded up",
}
Fits = Callable[[Sequence[int]], bool]


class RankTable:
    """The ranks of many layers as a step function of the threshold, from their whole spectra.

    Raises:
        SvdtuneError: there is no such rule.
    """

    def __init__(self, spectra: Mapping[str, Spectrum], rule: str = "sara") -> None:
        check_rule(rule)
        self.spectra, self.rule = spectra, rule
        shares = [self._shares_of(spectrum) for spectrum in spectra.values()]
        self._shares = [share.clamp_max(1.0).contiguous() for share in shares]
        self.steps = sorted({float(value) for share in self._shares for value in share} | {1.0})

    def at(self, threshold: float) -> list[int]:
        """The rank of each layer at a threshold, in the order given."""
        if self.rule != "sara":
            return [min(int((share < threshold).sum()) + 1, len(share)) for share in self._shares]
        found = (spectrum.locate(threshold)[0] for spectrum in self.spectra.values())
        return [k if k is not None else len(s.values) for k, s in zip(found, self.spectra.values(), strict=True)]

    def _shares_of(self, spectrum: Spectrum) -> Tensor:
        """The largest threshold at which a layer has each rank, ascending."""
        if not spectrum.total > 0:
            return spectrum.values.new_ones(1)
        if self.rule == "sara":
            return spectrum.values.cumsum(0) / spectrum.total
        whole = effective_rank(spectrum.values, self.rule)
        # of a whole number of directions, rounding must not add one
        most = min(max(1, math.ceil(whole - 1e-9)), len(spectrum.values))
        return spectrum.values.new_tensor(range(1, most + 1)) / whole

    def largest_threshold(self, fits: Fits) -> float | None:
        """The largest threshold whose ranks fit; None if rank 1 everywhere does not.

        Ranks change only where the threshold crosses a partial sum's share, so a bisection over
        these steps is exact. The threshold lies inside the last step that fits, with as few digits
        as that step allows.
        """
        low, high = -1, len(self.steps) - 1
        if fits(self.at(self.steps[high])):
            return 1.0
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(self.at(sum(self._step(middle)) / 2)) else (low, middle)
        return _shortest_between(*self._step(low)) if low >= 0 else None

    def _step(self, index: int) -> tuple[float, float]:
        """Ranks are the same between these two thresholds. At the upper one they are too, but for
        rounding."""
        return self.steps[index - 1] if index else 0.0, self.steps[index]


def effective_rank(values: Tensor, rule: str) -> float:
    """How many directions singular values [n] count as, from 1 to n, by "entropy" or "stable". They
    are descending and not all 0."""
    values = values.double()
    if rule == "stable":
        return float(values.square().sum() / values[0].square())
    shares = values[values > 0] / values.sum()
    return math.exp(-float((shares * shares.log()).sum()))


def check_rule(rule: str) -> None:
    """Raise `SvdtuneError` for a rule that is none."""
    if rule not in RULES:
        raise SvdtuneError(f"ranks come from a spectrum by one of {', '.join(RULES)}; got {rule!r}")


def _shortest_between(low: float, high: float) -> float:
    """The number with the fewest decimals in the upper half of (low, high)."""
    middle = low + (high - low) / 2
    for digits in range(1, 17):
        candidate = math.floor(high * 10**digits) / 10**digits
        if middle <= candidate < high:
            return candidate
    return middle


def parse_budget(text: str) -> tuple[float | None, int | None]:
    """(share, None) for "0.1%", (None, count) for "120000", "120k", "1.5M" or "2B".

    Raises:
        SvdtuneError: anything else, or nothing above 0.
    """
    cleaned = text.strip().lower().replace(",", "")
    units = {"%": 1.0, "k": 1e3, "m": 1e6, "b": 1e9}
    unit = cleaned[-1:] if cleaned[-1:] in units else ""
    size = (number_of(cleaned.removesuffix(unit)) or 0) * units.get(unit, 1.0)
    if unit == "%" and 0 < size < 100:
        return size / 100, None
    if unit != "%" and 1 <= size < 1e15:
        return None, int(size)
    raise SvdtuneError(
        f"budget {text!r} is neither a share of all parameters above 0% and below 100% ('0.1%') nor a count ('500k', '1.5M')"
    )
