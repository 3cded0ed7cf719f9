"""Block Krylov iteration for the leading singular triplets: one pass reads the weight twice, or its
Gram matrix once, and adds a block of directions.

Golub, Luk and Overton, "A block Lanczos method for computing the singular values and corresponding
singular vectors of a matrix", ACM TOMS 7 (1981), with full reorthogonalisation; Musco and Musco,
"Randomized block Krylov methods for stronger and faster approximate singular value decomposition"
(2015), for why few passes suffice.
"""

import math

import torch
from torch import Tensor

SEED = 0x5D


class BlockKrylov:
    """A growing basis Q [p, n] of the Krylov space of WᵀW, its rows orthonormal, and T = Q WᵀW Qᵀ
    [p, p], which is block tridiagonal.

    Args:
        W: a finite matrix [m, n], m >= n, fp32 or float64, on CPU or CUDA.
        block: directions that a pass adds.
        capacity: the most directions that the basis will hold.
        G: WᵀW [n, n] in W's dtype where it has been formed; a pass then costs n/2m of what it does
            with W.
    """

    def __init__(self, W: Tensor, block: int, capacity: int, G: Tensor | None = None) -> None:
        n = W.shape[1]
        self.W, self.G, self.block, self.p = W, G, block, 0
        self.Q = torch.empty(capacity, n, dtype=W.dtype, device=W.device)
        self.T = torch.zeros(capacity, capacity, dtype=torch.float64, device=W.device)
        # A generator of its own, on the CPU, so that every device starts from the same block and no
        # global state moves.
        start = torch.randn(n, block, generator=torch.Generator().manual_seed(SEED), dtype=torch.float64)
        self.next, _ = _orthonormalize(start.mT.to(W.device, W.dtype))
        self.R = self.T[:block, :block]  # set by the first pass

    @property
    def room(self) -> bool:
        """Whether another pass fits."""
        return self.p + self.block <= self.Q.shape[0]

    def extend(self) -> None:
        """One pass: add the waiting block to the basis, and find the next."""
        old, new = self.p, self.p + self.block
        self.Q[old:new] = X = self.next
        image = X @ self.G if self.G is not None else (X @ self.W.mT) @ self.W
        diagonal = X.double() @ image.double().mT
        self.T[old:new, old:new] = diagonal = (diagonal + diagonal.mT) / 2
        # Lanczos' recurrence: the image lies in the block itself, the one before and the next.
        rest = image - diagonal.to(X.dtype) @ X
        if old:
            before = slice(old - self.block, old)
            self.T[before, old:new], self.T[old:new, before] = self.R.mT, self.R
            rest -= self.R.to(X.dtype) @ self.Q[before]
        self.p = new
        self._find_next(rest)

    def _find_next(self, rest: Tensor) -> None:
        """Make the part of `rest` [block, n] outside the basis orthonormal: rest = Rᵀ · next, where
        R is `self.R`."""
        Q = self.Q[: self.p]
        R = torch.eye(self.block, dtype=torch.float64, device=rest.device)
        # Rounding leaves some of the basis in what is projected, and more of it the less is left:
        # then once more (Kahan: twice is enough). Where the space is exhausted, rounding is all
        # that is left, in which directions can nearly coincide: the sturdier factorisation, again.
        for _ in range(4):
            size, left = torch.linalg.vector_norm(rest, dim=1).max(), rest - (rest @ Q.mT) @ Q
            rest, step = _orthonormalize(left)
            kept = float(step.diagonal().min() / size)
            if math.isnan(kept):
                rest, step = _orthonormalize_safely(left)
            R = step @ R
            if kept > 0.1:
                break
        self.next, self.R = rest, R

    def ritz(self) -> tuple[Tensor, Tensor, Tensor]:
        """(squared singular values [p] descending, their vectors in the basis [p, p], residuals
        ‖WᵀWv − λv‖ [p]).

        The residual of a Ritz pair lies in the block not yet added, so it needs no further product.
        NaN marks a basis that broke down.
        """
        T = self.T[: self.p, : self.p]
        if not torch.isfinite(T).all() or not torch.isfinite(self.R).all():
            broken = torch.full((self.p,), float("nan"), dtype=torch.float64)
            return broken, torch.full_like(T, float("nan")), broken
        values, vectors = torch.linalg.eigh(T)
        values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
        residuals = torch.linalg.vector_norm(self.R @ vectors[-self.block :], dim=0)
        return values.cpu(), vectors, residuals.cpu()

    def misses_copies(self, values: Tensor) -> bool:
        """Whether `values` (squared, descending) hold a full block of near-equal ones.

        From one starting block the iteration finds at most `block` copies of a repeated singular
        value, so more of them may be missing.
        """
        if len(values) < self.block:
            return False
        return bool((values[: len(values) - self.block + 1] * (1 - 1e-3) <= values[self.block - 1 :]).any())


def _orthonormalize(X: Tensor) -> tuple[Tensor, Tensor]:
    """(Q [b, n] in X's dtype with orthonormal rows, R [b, b] in float64) with X = RᵀQ, by Cholesky,
    the quickest on a GPU; NaN where X lost rank."""
    wide = X.double()
    L, info = torch.linalg.cholesky_ex(wide @ wide.mT)
    L = torch.where(info == 0, L, torch.nan)
    return torch.linalg.solve_triangular(L, wide, upper=False).to(X.dtype), L.mT


def _orthonormalize_safely(X: Tensor) -> tuple[Tensor, Tensor]:
    """The same by Householder reflections, whatever X's rank."""
    Q, R = torch.linalg.qr(X.mT.double())
    return Q.mT.to(X.dtype), R
