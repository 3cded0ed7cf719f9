"""Singular values of a weight with a bound on their error, and the rank that reaches a share of
their sum."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from svdtune.errors import SvdtuneError
from svdtune.linalg.gram import gram, noise
from svdtune.linalg.krylov import BlockKrylov
from svdtune.linalg.matrix import (
    check_threshold,
    largest_entry,
    power_of_two,
    tall,
    working_copy,
)
from svdtune.linalg.nuclear import nuclear_norm
from svdtune.linalg.precision import full_precision

# Up to this size LAPACK's SVD is as quick as anything.
DENSE = 128
# From this size on it pays to try a cheaper answer first and to fall back on float64.
LARGE = 1024
# LAPACK's SVD is backward stable: each value is off by a few ε·σ₁.
_SVD_NOISE = 8.0


@dataclass(frozen=True)
class Spectrum:
    """The singular values of a weight and how far to trust them.

    Attributes:
        values: float64 on CPU, descending, length min(out, in); fewer where only the leading ones
            were computed.
        total: the sum of all singular values, the nuclear norm.
        error: bound on the absolute error of `total`, of each value and of every partial sum.
        squared_error: bound on the error of each squared value; it bounds the leading partial sums
            more tightly than `error` does. 0 where nothing is known beyond `error`.
        reference: whether the values are those of a float64 SVD, against which ranks are defined.
    """

    values: Tensor
    total: float
    error: float
    squared_error: float = 0.0
    reference: bool = False

    @property
    def exact(self) -> bool:
        """Whether the values come from float64 arithmetic throughout."""
        return self.reference or self.squared_error <= 1e-12 * float(self.values[0]) ** 2

    def partial_errors(self) -> Tensor:
        """Bounds on the errors of the partial sums: [len(values)], float64."""
        count = torch.arange(1, len(self.values) + 1, dtype=torch.float64, device="cpu")
        if self.squared_error == 0:
            return self.error * count / len(self.values)
        return _value_errors(self.values, self.squared_error).cumsum(0)

    def locate(self, threshold: float) -> tuple[int | None, bool]:
        """(rank at `threshold`, whether no error within the bounds could change it). The rank is
        None if it lies beyond the values."""
        sums, target = self.values.cumsum(0), threshold * self.total
        reached = (sums >= target).nonzero()
        if self.total == 0:
            return 1, True
        if len(reached) == 0:
            return (len(sums), False) if threshold == 1 else (None, False)
        at = int(reached[0])
        slack = self.partial_errors() + threshold * self.error
        above = float(sums[at] - target) > float(slack[at])
        below = at == 0 or float(target - sums[at - 1]) > float(slack[at - 1])
        return at + 1, self.reference or (above and below)


def spectrum(weight: Tensor, *, dtype: torch.dtype | None = None) -> Spectrum:
    """All singular values of a weight [out, in].

    The square roots of the eigenvalues of the Gram matrix over the short side, formed and solved in
    `dtype`; LAPACK's SVD in float64 where the short side n is at most 128. An eigenvalue is off by
    up to δ = (16 + 2√n) ε λ₁, four times that in float64 (see `noise`), so a singular value σ by up
    to min(√δ, δ/σ): in float64, below 1e-12·σ₁ for values near σ₁ and at most 4e-7·σ₁ for zeros.
    `Spectrum.error` sums these.

    Args:
        weight: [out, in], any floating dtype; computed on its device, or on the CPU where that
            lacks float64.
        dtype: torch.float64 (default), or torch.float32, about twice as fast on a CPU.

    Raises:
        SvdtuneError: `weight` is not a finite matrix, or `dtype` is another one.
    """
    dtype = dtype or torch.float64
    if dtype not in (torch.float32, torch.float64):
        raise SvdtuneError(f"a spectrum is computed in torch.float32 or torch.float64, not {dtype}")
    largest = largest_entry(weight)
    n = min(weight.shape)
    if largest == 0:
        return Spectrum(torch.zeros(n, dtype=torch.float64, device="cpu"), 0.0, 0.0, reference=True)
    if n <= DENSE:
        return _by_svd(weight)
    scale = power_of_two(largest)
    with full_precision(weight.device):
        return from_eigenvalues(torch.linalg.eigvalsh(gram(weight, scale, dtype)), scale)


def from_eigenvalues(squared: Tensor, scale: float) -> Spectrum:
    """The spectrum of a weight from the eigenvalues [n], ascending, of its Gram matrix over
    scale²."""
    dtype = squared.dtype
    squared = squared.flip(0).cpu().double().clamp_min(0)
    values = squared.sqrt()
    delta = noise(float(squared[0]), len(squared), dtype)
    error = float(_value_errors(values, delta).sum())
    return Spectrum(values * scale, float(values.sum()) * scale, error * scale, delta * scale**2)


def rank_at_threshold(values: Tensor | Spectrum, threshold: float) -> int:
    """SARA Algorithm 1: the least k >= 1 whose first k values sum to at least `threshold` times the
    whole sum.

    The listing compares with `threshold` alone; its text and its parameter counts mean a share of
    the sum. A zero weight has rank 1. The values are taken as they are; `safe_rank` also makes sure
    that their errors cannot matter.

    Args:
        values: all singular values, descending [min(out, in)], or a `Spectrum`.
        threshold: θ in (0, 1].

    Raises:
        SvdtuneError: `threshold` outside (0, 1]; values empty, not finite or negative; a `Spectrum`
            that ends too early.
    """
    check_threshold(threshold)
    if isinstance(values, Spectrum):
        k, _ = values.locate(threshold)
        if k is None:
            raise SvdtuneError(
                f"this spectrum holds only the {len(values.values)} leading values, short of threshold {threshold}; "
                "compute the whole spectrum"
            )
        return k
    values = values.detach().to("cpu", torch.float64)
    if values.ndim != 1 or len(values) == 0 or not torch.isfinite(values).all() or (values < 0).any():
        raise SvdtuneError(f"singular values must be a finite vector of numbers >= 0; got shape {tuple(values.shape)}")
    k, _ = Spectrum(values, float(values.cumsum(0)[-1]), 0.0).locate(threshold)
    assert k is not None
    return k


def safe_rank(weight: Tensor, threshold: float) -> int:
    """The rank at `threshold` of a weight [out, in], equal to the one its float64 SVD gives.

    Raises:
        SvdtuneError: `threshold` outside (0, 1], or `weight` is not a finite matrix.
    """
    return settled_spectrum(weight, threshold)[1]


def settled_spectrum(weight: Tensor, threshold: float, known: Spectrum | None = None) -> tuple[Spectrum, int]:
    """(a spectrum of `weight` [out, in] that settles `threshold`, the rank there).

    Tries `known`, then ever more exact spectra, until no partial sum lies within its error bound of
    the target; a float64 SVD settles what is left, such as exact ties. On a GPU a small threshold
    needs only the nuclear norm and the leading values.
    """
    check_threshold(threshold)
    attempts: list[Callable[[], Spectrum | None]] = [partial(spectrum, weight), partial(_by_svd, weight)]
    if known is not None:
        attempts.insert(0, lambda: known)
    elif min(weight.shape) >= LARGE and weight.is_cuda:
        attempts.insert(0, partial(_leading, weight, threshold))
    elif min(weight.shape) >= LARGE and threshold <= 0.2:
        attempts.insert(0, partial(spectrum, weight, dtype=torch.float32))
    for attempt in attempts:
        found = attempt()
        if found is None:
            continue
        k, settled = found.locate(threshold)
        if k is not None and settled:
            return found, k
    raise AssertionError("a float64 SVD settles every threshold")


def _value_errors(values: Tensor, squared_error: float) -> Tensor:
    """min(√δ, δ/σ) for each singular value σ whose square is off by up to δ."""
    return (squared_error / values.clamp_min(squared_error**0.5)).clamp_max(squared_error**0.5)


def _by_svd(weight: Tensor) -> Spectrum:
    """The singular values that LAPACK's SVD gives in float64 on the CPU."""
    largest_entry(weight)
    values = torch.linalg.svdvals(weight.detach().cpu().to(torch.float64)).clamp_min(0)
    error = _SVD_NOISE * torch.finfo(torch.float64).eps * float(values[0]) * len(values)
    return Spectrum(values, float(values.cumsum(0)[-1]), error, reference=True)


def _leading(weight: Tensor, threshold: float) -> Spectrum | None:
    """The leading values and the nuclear norm, as far as `threshold` needs them; None if they are
    no shortcut."""
    largest, n = largest_entry(weight), min(weight.shape)
    if largest == 0:
        return None
    scale = power_of_two(largest)
    with full_precision(weight.device):
        W = tall(working_copy(weight, scale, torch.float32))
        krylov = BlockKrylov(W, 64, capacity=n // 2)
        total = error = 0.0
        check_at = 256
        while krylov.room:
            krylov.extend()
            if krylov.p < check_at:
                continue
            squared, _, residuals = krylov.ritz()
            if not torch.isfinite(squared).all() or krylov.misses_copies(squared):
                return None
            values = squared.sqrt()
            if total == 0:
                total, error = nuclear_norm(W, float(values[0] + residuals[0] / values[0]))
            good = int((residuals <= 1e-5 * squared).to(torch.int8).cumprod(0).sum())
            if good and float(values[:good].sum()) > threshold * (total + error):
                delta = float(residuals[:good].max() + 8 * torch.finfo(torch.float32).eps * squared[0])
                return Spectrum(values[:good] * scale, total * scale, error * scale, delta * scale**2)
            # Ritz values are lower bounds, so about this many are needed; a basis of eight times as
            # many settles them.
            missing = threshold * total - float(values.sum())
            k = int((values.cumsum(0) < threshold * total).sum()) + max(0, int(missing / float(values[-1])))
            if not k <= n // 16:
                return None
            check_at = max(krylov.p + 128, 8 * k)
    return None
