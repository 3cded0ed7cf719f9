"""The singular factors of a weight: the leading ones, or those of any band of its spectrum."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from svdtune.errors import SvdtuneError
from svdtune.linalg.gram import gram, noise
from svdtune.linalg.krylov import BlockKrylov
from svdtune.linalg.matrix import (
    check_rank,
    check_threshold,
    largest_entry,
    power_of_two,
    tall,
    working_copy,
)
from svdtune.linalg.orthonormal import fixed_signs, polish
from svdtune.linalg.precision import full_precision
from svdtune.linalg.spectrum import DENSE, LARGE, Spectrum, from_eigenvalues, settled_spectrum

# Relative error allowed to the smallest singular value kept, and to Ritz residuals against the
# smallest squared one. A Ritz value errs by the residual squared, but vectors on the two sides of
# σ_r mix by the residual over the gap there, and with them the weight's best approximation: for
# spectra like LLaMA's, by a third of the residual.
_ACCURACY = 1e-5
_RESIDUAL = 5e-6
_EXACT = 1e-9
# U's departure from orthonormal before it is polished, which squares it.
_ALL = 1e-2
# The share of a spectrum's sum above which the rank is likely too large for the Krylov route.
_MANY = 0.2


# Which triplets of a spectrum: "first", "middle", "last", or from one number up to another.
Components = str | Sequence[int]
BANDS = ("first", "middle", "last")


class Factors(NamedTuple):
    """W ≈ U · diag(s) · Vh in fp32: U [out, r] and Vh [r, in] orthonormal, s [r] descending and >=
    0."""

    U: Tensor
    s: Tensor
    Vh: Tensor


def top_factors(weight: Tensor, r: int, *, exact: bool = False) -> Factors:
    """The r leading singular triplets of a weight [out, in], on its device.

    Three routes, each taken where the one before would not do:

    1. *Block Krylov* (`BlockKrylov`) where min(out, in) is 1024 or more and r small beside it:
       fp32, or float64 where σ₁/σ_r is too large for fp32. Relative error of σ at most 1e-5,
       usually below 1e-7.
    2. *Gram matrix and its eigenvectors* in float64, while σ₁/σ_r stays below about 4e4. Relative
       error 1e-10.
    3. LAPACK's SVD in float64 on the CPU: rank-deficient weights, whose null vectors it completes.

    The columns of U and V are orthonormal to fp32's rounding whichever route was taken. Signs make
    the first entry of v within 10 % of its largest positive. Nothing is drawn from the global
    random state. Repeated calls agree bit for bit on one machine; other devices and thread counts
    agree up to rounding (within repeated singular values any basis is right).

    Args:
        weight: a matrix [out, in].
        r: how many triplets.
        exact: leave out the first route, and the second unless it gives σ_r to 1e-9: vectors to
            fp32's rounding wherever two singular values do not nearly agree, hence the same on
            every machine.

    Raises:
        SvdtuneError: r outside 1 … min(out, in), or `weight` is not a finite matrix.
    """
    largest = largest_entry(weight)
    check_rank(r, weight.shape)
    return _decompose(weight, largest, 0, r, exact)


def band_factors(weight: Tensor, start: int, stop: int, *, exact: bool = False) -> Factors:
    """The singular triplets number `start` to `stop` − 1 of a weight [out, in], counted from 0 at
    the largest, by the routes of `top_factors` and with their errors.

    Route 1 finds the triplets before the band too, so it is taken for bands near the top alone.

    Args:
        weight: a matrix [out, in].
        start, stop: 0 <= start < stop <= min(out, in).
        exact: as in `top_factors`.

    Returns:
        U [out, stop − start], s [stop − start] descending, Vh [stop − start, in].

    Raises:
        SvdtuneError: the band is empty or outside the spectrum, or `weight` is not a finite matrix.
    """
    largest = largest_entry(weight)
    check_inside(start, stop, weight.shape)
    return _decompose(weight, largest, start, stop, exact)


def all_factors(weight: Tensor) -> Factors | None:
    """All singular triplets of a weight [out, in], on its device, from the eigenvectors of its Gram
    matrix in float64; what a GPU does several times sooner than `torch.linalg.svd`.

    W − U diag(s) Vᵀ and the departures of U and V from orthonormal are fp32's rounding.

    Returns:
        None where the Gram matrix does not settle the smallest (below some 4e-6 of the largest;
        rank-deficient weights and zero).

    Raises:
        SvdtuneError: `weight` is not a finite matrix.
    """
    largest = largest_entry(weight)
    if largest == 0:
        return None
    scale = power_of_two(largest)
    with full_precision(weight.device):
        triplets = _by_gram(weight, 0, min(weight.shape), scale, _ALL)
        return triplets and _signed(weight, triplets, scale)


def check_inside(start: int, stop: int, shape: Sequence[int]) -> None:
    """Raise `SvdtuneError` unless a weight of this shape has the triplets start … stop."""
    if not 0 <= start < stop <= min(shape):
        raise SvdtuneError(
            f"the band ({start}, {stop}) lies outside the spectrum of a weight {tuple(shape)}; expected "
            f"0 <= start < stop <= {min(shape)}"
        )


def check_band(components: Components) -> None:
    """Raise `SvdtuneError` for what names no triplets of any spectrum."""
    if isinstance(components, str):
        named = components in BANDS
    else:
        named = len(components) == 2 and all(isinstance(number, int) for number in components)
        named = named and 0 <= components[0] < components[1]
    if not named:
        raise SvdtuneError(
            f"components must be one of {', '.join(BANDS)}, or whole numbers (start, stop) with 0 <= start < stop; got "
            f"{components!r}"
        )


def band_of(components: Components, r: int, n: int) -> tuple[int, int]:
    """(start, stop) of the r triplets that `components` names among n.

    Args:
        components: "first", "middle", "last", or the band itself.
        r: how many; of a band, its length.
        n: how many there are.

    Raises:
        SvdtuneError: `components` names none, or a band of another length.
    """
    check_band(components)
    if isinstance(components, str):
        start = {"first": 0, "middle": (n - r) // 2, "last": n - r}[components]
        return start, start + r
    start, stop = components
    if stop - start != r:
        raise SvdtuneError(f"components ({start}, {stop}) must be (start, stop) with stop − start = r, here {r}")
    return start, stop


def factors_at_threshold(weight: Tensor, threshold: float, known: Spectrum | None = None) -> tuple[Spectrum, Factors]:
    """A spectrum that settles `threshold`, and as many leading triplets as the rank there says.

    What `settled_spectrum` and then `top_factors` give, up to rounding. Where both would take the
    Gram matrix anyway (no spectrum is `known`, and a large share of the sum takes many triplets),
    one matrix and one eigendecomposition serve both.

    Args:
        weight: a matrix [out, in].
        threshold: θ in (0, 1].
        known: its spectrum, if it was found before.

    Raises:
        SvdtuneError: `threshold` outside (0, 1], or `weight` is not a finite matrix.
    """
    check_threshold(threshold)
    largest = largest_entry(weight)
    if known is None and threshold > _MANY and largest > 0 and min(weight.shape) > DENSE:
        scale = power_of_two(largest)
        with full_precision(weight.device):
            squared, V = torch.linalg.eigh(gram(weight, scale, torch.float64))
            found = from_eigenvalues(squared, scale)
            k, settled = found.locate(threshold)
            triplets = _from_eigenvectors(weight, squared, V, 0, k, scale, _ACCURACY) if settled and k else None
            if triplets is not None:
                return found, _signed(weight, triplets, scale)
            known = found
    found, k = settled_spectrum(weight, threshold, known)
    return found, top_factors(weight, k)


def _decompose(weight: Tensor, largest: float, start: int, stop: int, exact: bool) -> Factors:
    """The triplets of a band of a finite weight whose largest entry is given."""
    scale = power_of_two(largest)
    with full_precision(weight.device):
        found = None
        if largest > 0:
            if not exact:
                try:
                    found = _by_krylov(weight, stop, scale, torch.float32)
                except _TooCoarse:
                    found = _by_krylov(weight, stop, scale, torch.float64)
                if found is not None:
                    U, s, V = found
                    found = U[:, start:], s[start:], V[:, start:]
            found = found or _by_gram(weight, start, stop, scale, _EXACT if exact else _ACCURACY)
        return _signed(weight, found or _by_lapack(weight, start, stop, scale), scale)


Triplets = tuple[Tensor, Tensor, Tensor]  # U [m, r], s [r], V [n, r] in float64, m >= n


def _signed(weight: Tensor, triplets: Triplets, scale: float) -> Factors:
    """The factors of a weight from triplets of tall(weight) / scale."""
    U, s, V = triplets
    signs = fixed_signs(V)
    long, short = (U * signs).float(), (V * signs).float()
    if weight.shape[0] < weight.shape[1]:
        long, short = short, long
    device = weight.device
    return Factors(long.contiguous().to(device), (s * scale).float().to(device), short.mT.contiguous().to(device))


class _TooCoarse(Exception):
    """Rounding in the dtype of a Krylov basis hides the smallest singular value that is wanted."""


def _by_krylov(weight: Tensor, r: int, scale: float, dtype: torch.dtype) -> Triplets | None:
    """Triplets of tall(weight) / scale from a Krylov basis, or None where it would not pay or
    cannot be trusted.

    Raises:
        _TooCoarse: in another dtype it might.
    """
    n = min(weight.shape)
    block = 32 if r <= 256 else 64
    # Beyond half of all directions a dense solver is cheaper, and the blocks break down as the
    # space fills up. Nor does it pay for small weights: a decomposition takes milliseconds, and
    # their spectra are flat, which takes many blocks.
    if n < LARGE or 2 * (r + 4 * block) > n:
        return None
    W = tall(working_copy(weight, scale, dtype))
    # A pass with the Gram matrix multiplies n² numbers where one with W takes 2mn. Forming it takes
    # half of m n², by products twice as fast as thin ones; on a GPU those cost least.
    expected = 3 * r + 10 * block
    pays = not W.is_cuda and n * (len(W) + 4 * expected) < 8 * len(W) * expected
    krylov = BlockKrylov(W, block, 5 * n // 8, gram(W, 1.0, dtype) if pays else None)
    # Solving the projected problem is what costs most on a GPU, so it is put off until it is likely
    # to be solved once: at most a pass after spectra like LLaMA's are done, for n = 1024 … 4096 and
    # r = 8 … 256. On a CPU an early look tells how many passes are missing.
    check_at = max(4 * r, r + 8 * block)
    if krylov.ahead:
        check_at = max(check_at, round(10 * (n * r) ** (1 / 3)) + 2 * block)
    while krylov.room:
        krylov.extend()
        if krylov.p < check_at and krylov.room:
            continue
        values, vectors, residuals = krylov.ritz()
        # Rounding in W V leaves a relative error of some 4 ε σ₁/σ_r in σ_r, the float64
        # eigenproblem one of its noise.
        rounding = 4 * torch.finfo(dtype).eps * values[0].sqrt() <= _ACCURACY * values[r - 1].sqrt()
        solving = noise(float(values[0]), krylov.p, torch.float64) <= _ACCURACY * float(values[r - 1])
        if not solving or krylov.misses_copies(values[:r]):
            return None
        if not rounding:
            if dtype == torch.float64:
                return None
            raise _TooCoarse
        found = int((residuals[:r] <= _RESIDUAL * values[r - 1]).sum())
        if found == r:
            return _triplets(W, polish((krylov.Q[: krylov.p].mT @ vectors[:, :r].to(dtype)).double()))
        # Once its turn has come, a triplet takes two directions or a few more.
        check_at = krylov.p + max(block, 9 * (r - found) // 4)
    return None


def _triplets(W: Tensor, V: Tensor) -> Triplets:
    """The triplets of W [m, n] whose right vectors are V [n, r], in float64 and orthonormal, in any
    order; all but W V in float64.

    Within the accuracy that every route here asks of V, the columns of W V are as good as
    orthogonal: what is missing, `polish` squares.
    """
    US = (W @ V.to(W.dtype)).double()
    s, order = torch.linalg.vector_norm(US, dim=0).sort(descending=True, stable=True)
    return polish(US[:, order] / s), s, V[:, order]


def _by_gram(weight: Tensor, start: int, stop: int, scale: float, accuracy: float) -> Triplets | None:
    """Triplets of tall(weight) / scale from the eigenvectors of its Gram matrix, or None where the
    smallest is too small."""
    squared, V = torch.linalg.eigh(gram(weight, scale, torch.float64))
    return _from_eigenvectors(weight, squared, V, start, stop, scale, accuracy)


def _from_eigenvectors(
    weight: Tensor, squared: Tensor, V: Tensor, start: int, stop: int, scale: float, accuracy: float
) -> Triplets | None:
    """The same from all eigenvalues, ascending, and eigenvectors."""
    n, largest = len(V), float(squared[-1])
    squared, V = squared[n - stop : n - start].flip(0), V[:, n - stop : n - start].flip(1)
    if not noise(largest, n, torch.float64) <= accuracy * float(squared[-1]):
        return None
    return _triplets(tall(working_copy(weight, scale, torch.float64)), V)


def _by_lapack(weight: Tensor, start: int, stop: int, scale: float) -> Triplets:
    """Triplets of tall(weight) / scale by a dense SVD."""
    U, s, Vh = torch.linalg.svd(tall(working_copy(weight.cpu(), scale, torch.float64)), full_matrices=False)
    return U[:, start:stop], s[start:stop], Vh[start:stop].mT
