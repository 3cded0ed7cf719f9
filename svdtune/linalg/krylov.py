"""Block Krylov iteration for the leading singular triplets: one pass reads the weight twice, or its
Gram matrix once, and adds a block of directions.

Golub, Luk and Overton, "A block Lanczos method for computing the singular values and corresponding
singular vectors of a matrix", ACM TOMS 7 (1981), with full reorthogonalisation; Musco and Musco,
"Randomized block Krylov methods for stronger and faster approximate singular value decomposition"
(2015), for why few passes suffice.
"""

import math
from functools import lru_cache

import torch
from torch import Tensor

SEED = 0x5D
# The share of a block's rows that has to be left after one round of projection and factorisation.
_KEPT = 0.1
# Passes between two checks where the host runs ahead.
_UNCHECKED = 8


class BlockKrylov:
    """A growing basis Q [p, n] of the Krylov space of WᵀW, its rows orthonormal, and T = Q WᵀW Qᵀ
    [p, p], which is block tridiagonal; of T the lower triangle is kept.

    A host that looks at a number of a GPU waits until all that it asked for is done. So there a
    pass looks at nothing, and what it took for granted is looked at after several (`_check`).

    Args:
        W: a finite matrix [m, n], m >= n, fp32 or float64, on CPU or CUDA.
        block: directions that a pass adds.
        capacity: the most directions that the basis will hold.
        G: WᵀW [n, n] in W's dtype where it has been formed; a pass then costs n/2m of what it does
            with W.
    """

    def __init__(self, W: Tensor, block: int, capacity: int, G: Tensor | None = None) -> None:
        n = W.shape[1]
        self.W, self.G, self.block, self.capacity, self.p = W, G, block, capacity, 0
        # The block of rows after the p first is the one that waits, and so in T.
        self.Q = torch.empty(capacity + block, n, dtype=W.dtype, device=W.device)
        self.T = torch.zeros(capacity + block, capacity, dtype=torch.float64, device=W.device)
        self.Q[:block] = _start(n, block).to(W.dtype)
        self.ahead = runs_ahead(W)
        self._looks = not self.ahead
        self._sizes = torch.empty(capacity // block, block, dtype=W.dtype, device=W.device)
        self._failed: list[Tensor] = []  # of each pass not yet checked, whether Cholesky's was

    @property
    def room(self) -> bool:
        """Whether another pass fits."""
        return self.p + self.block <= self.capacity

    def extend(self) -> None:
        """One pass: add the waiting block to the basis, and find the next."""
        old, new = self.p, self.p + self.block
        X = self.Q[old:new]
        image = X @ self.G if self.G is not None else (X @ self.W.mT) @ self.W
        torch.mm(X.double(), image.double().mT, out=self.T[old:new, old:new])
        # Lanczos' recurrence: the image lies in the block itself, the one before and the next.
        near = slice(max(0, old - self.block), new)
        image.addmm_(self.T[old:new, near].to(X.dtype), self.Q[near], alpha=-1)
        self.p = new
        if self._looks:
            self._find_next(image)
        else:
            torch.linalg.vector_norm(image, dim=1, out=self._sizes[old // self.block])
            found, step, failed = _orthonormalize(self._outside(image))
            self._wait(found, step)
            self._failed.append(failed)
            if len(self._failed) == _UNCHECKED:
                self._check()

    def _outside(self, rest: Tensor) -> Tensor:
        """`rest` [block, n] less its part in the basis."""
        Q = self.Q[: self.p]
        return rest.addmm_(rest @ Q.mT, Q, alpha=-1)

    def _wait(self, found: Tensor, R: Tensor) -> None:
        """Have `found`, orthonormal, wait for the next pass; what is left of this one's image is
        Rᵀ · found."""
        new = slice(self.p, self.p + self.block)
        self.Q[new], self.T[new, self.p - self.block : self.p] = found, R

    def _find_next(self, rest: Tensor) -> None:
        """Make the part of `rest` [block, n] outside the basis orthonormal."""
        R: Tensor | None = None
        # Rounding leaves some of the basis in what is projected, and more of it the less is left:
        # then once more (Kahan: twice is enough). Where the space is exhausted, rounding is all
        # that is left, in which directions can nearly coincide: the sturdier factorisation, again.
        for _ in range(4):
            size = torch.linalg.vector_norm(rest, dim=1).max()
            left = self._outside(rest.to(self.Q.dtype))
            rest, step, failed = _orthonormalize(left)
            kept = 0.0 if failed else float(step.diagonal().min() / size)
            if failed:
                rest, step = _orthonormalize_safely(left)
            R = step if R is None else step @ R
            if kept > _KEPT:
                break
        assert R is not None
        self._wait(rest, R)

    def _check(self) -> None:
        """Take back every pass from the first that another round would have served, and look at
        each from there on."""
        passes = len(self._failed)
        if not passes:
            return
        first = self.p // self.block - passes
        pivots = self.T.diagonal(-self.block)[first * self.block : self.p].view(passes, self.block)
        kept = pivots.amin(1) / self._sizes[first : first + passes].amax(1)
        good = (kept > _KEPT) & (torch.stack(self._failed) == 0)
        right = int(good.cumprod(0).sum())
        self._failed.clear()
        if right < passes:
            self._looks, self.p = True, (first + right) * self.block

    def ritz(self) -> tuple[Tensor, Tensor, Tensor]:
        """(squared singular values [p] descending, their vectors in the basis [p, p], residuals
        ‖WᵀWv − λv‖ [p]); the first and the last on the CPU.

        The residual of a Ritz pair lies in the block not yet added, so it needs no further product.
        NaN marks a basis that broke down.
        """
        wanted = self.p
        self._check()
        while self.p < wanted:  # passes were taken back, and now each is looked at
            self.extend()
        T, R = self.T[: self.p, : self.p], self.T[self.p : self.p + self.block, self.p - self.block : self.p]
        if not math.isfinite(T.sum() + R.sum()):
            broken = torch.full((self.p,), float("nan"), dtype=torch.float64, device="cpu")
            return broken, torch.full_like(T, float("nan")), broken
        values, vectors = torch.linalg.eigh(T)
        residuals = torch.linalg.vector_norm(R @ vectors[-self.block :], dim=0)
        values, residuals = torch.stack([values, residuals]).flip(1).clamp_min(0).cpu()
        return values, vectors.flip(1), residuals

    def misses_copies(self, values: Tensor) -> bool:
        """Whether `values` (squared, descending) hold a full block of near-equal ones.

        From one starting block the iteration finds at most `block` copies of a repeated singular
        value, so more of them may be missing.
        """
        if len(values) < self.block:
            return False
        return bool((values[: len(values) - self.block + 1] * (1 - 1e-3) <= values[self.block - 1 :]).any())


@lru_cache(maxsize=4)
def _start(n: int, block: int) -> Tensor:
    """The first block [block, n], orthonormal, in float64 on the CPU, so that every device starts
    from the same one; from a generator of its own, so that no global state moves."""
    generator = torch.Generator().manual_seed(SEED)
    drawn = torch.randn(n, block, generator=generator, dtype=torch.float64, device="cpu")
    return _orthonormalize(drawn.mT)[0]


def runs_ahead(W: Tensor) -> bool:
    """Whether a host that looks at no number has the next operation ready while this one runs."""
    return W.is_cuda


def _orthonormalize(X: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(Q [b, n] with orthonormal rows, R [b, b], both in float64, whether it failed: 0 if not) with
    X = RᵀQ, by Cholesky, the quickest on a GPU; it fails where X lost rank."""
    wide = X.double()
    L, failed = torch.linalg.cholesky_ex(wide @ wide.mT)
    return torch.linalg.solve_triangular(L, wide, upper=False), L.mT, failed


def _orthonormalize_safely(X: Tensor) -> tuple[Tensor, Tensor]:
    """The same by Householder reflections, whatever X's rank."""
    Q, R = torch.linalg.qr(X.mT.double())
    return Q.mT, R
