"""Block Krylov iteration for the leading singular triplets: one pass reads the weight twice and
adds a block of directions.

Golub, Luk and Overton, "A block Lanczos method for computing the singular values and corresponding
singular vectors of a matrix", ACM TOMS 7 (1981), with full reorthogonalisation; Musco and Musco,
"Randomized block Krylov methods for stronger and faster approximate singular value decomposition"
(2015), for why few passes suffice. Not squaring the weight first keeps the error of a singular
value near ε·σ₁, where a Gram matrix would give ε·σ₁²/σ.
"""

import torch
from torch import Tensor

SEED = 0x5D


class BlockKrylov:
    """A growing orthonormal basis Q [n, p] of the Krylov space of WᵀW, with B = WQ [m, p] and T =
    BᵀB [p, p].

    Args:
        W: a finite matrix [m, n], m >= n, fp32 or float64, on CPU or CUDA.
        block: directions that a pass adds.
        capacity: the most directions that the basis will hold.
    """

    def __init__(self, W: Tensor, block: int, capacity: int) -> None:
        m, n = W.shape
        self.W, self.block, self.p = W, block, 0
        self.Q = torch.empty(n, capacity, dtype=W.dtype, device=W.device)
        self.B = torch.empty(m, capacity, dtype=torch.float64, device=W.device)
        self.T = torch.empty(capacity, capacity, dtype=torch.float64, device=W.device)
        # A generator of its own, on the CPU, so that every device starts from the same block and no
        # global state moves.
        start = torch.randn(n, block, generator=torch.Generator().manual_seed(SEED), dtype=torch.float64)
        self.next = _orthonormalize(start.to(W.device, W.dtype))[0]
        self.R = self.T[:block, :block]  # set by the first pass

    @property
    def room(self) -> bool:
        """Whether another pass fits."""
        return self.p + self.block <= self.Q.shape[1]

    def extend(self) -> None:
        """One pass: add the waiting block to the basis, and find the next."""
        old, new = self.p, self.p + self.block
        self.Q[:, old:new] = self.next
        product = self.W @ self.next
        self.B[:, old:new] = product
        self.T[old:new, :new] = self.B[:, old:new].mT @ self.B[:, :new]
        self.T[:old, old:new] = self.T[old:new, :old].mT
        self.p = new
        self._find_next(self.W.mT @ product)

    def _find_next(self, image: Tensor) -> None:
        """Make the part of `image` [n, block] outside the basis orthonormal: the waiting block,
        with its R."""
        Q = self.Q[:, : self.p]
        # Projecting twice is enough (Kahan) where the second time changes little. Where the space
        # is exhausted the first leaves only rounding, in which directions can nearly coincide: then
        # once more, by the sturdier factorisation.
        for passes, factorize in ((2, _orthonormalize), (3, _orthonormalize_safely)):
            block, R = image, torch.eye(self.block, dtype=torch.float64, device=image.device)
            for _ in range(passes):
                block, last = factorize(block - Q @ (Q.mT @ block))
                R = last @ R
            if bool(last.diagonal().abs().min() > 0.5):
                break
        self.next, self.R = block, R

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
    """(Q [n, b] in X's dtype, R [b, b] in float64) with X = QR, by Cholesky, the quickest on a GPU;
    NaN where X lost rank."""
    wide = X.double()
    L, info = torch.linalg.cholesky_ex(wide.mT @ wide)
    L = torch.where(info == 0, L, torch.nan)
    return torch.linalg.solve_triangular(L, wide.mT, upper=False).mT.to(X.dtype), L.mT


def _orthonormalize_safely(X: Tensor) -> tuple[Tensor, Tensor]:
    """The same by Householder reflections, whatever X's rank."""
    Q, R = torch.linalg.qr(X.double())
    return Q.to(X.dtype), R
