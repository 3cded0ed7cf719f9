"""The nuclear norm of a weight by matrix products alone, which is what a GPU does fastest.

Polar iteration: W = QH with QᵀQ = I and H positive semidefinite, and the nuclear norm is tr(H) =
tr(QᵀW). Q is the limit of X ← X·p(XᵀX) with the polynomials of Amsel, Persson, Musco and Gower,
"The Polar Express" (2025): at each step the odd quintic closest to 1 on the interval that holds the
singular values.
"""

from functools import cache, partial

import torch
from torch import Tensor

# Singular values below this share of σ₁ are not driven to 1; they count in the error bound.
FLOOR = 1e-4
# Outside their interval the quintics diverge, and rounding to ten bits can push a value out; each
# step stays this far inside.
_SAFETY = 1.01


def nuclear_norm(W: Tensor, largest: float) -> tuple[float, float]:
    """(nuclear norm, bound on its error) of a matrix [m, n], m >= n, given an upper estimate of σ₁.

    On a GPU the steps multiply in fp16. What that leaves, X = Q(I + S + K) with S symmetric and K
    skew, is corrected to third order in S through E = XᵀX − I, in fp32: tr(H) ≈ tr(XᵀW) −
    ½tr(E·XᵀW) + ⅜tr(E²·XᵀW) − …; K enters only squared, and shows as the skew part of XᵀW. The
    bound adds up both, the values under `FLOOR`·σ₁ and the rounding of the traces.
    """
    X = W / (1.01 * largest)
    # fp16 has TF32's ten bits, but asks for no setting that other threads would see.
    dtype = torch.float16 if W.is_cuda else W.dtype
    for a, b, c in ((a / _SAFETY, b / _SAFETY**3, c / _SAFETY**5) for a, b, c in _quintics(FLOOR)):
        low = X.to(dtype)
        A = low.mT @ low
        X = a * X + low @ torch.addmm(A, A, A, beta=b, alpha=c)
    E = X.mT @ X
    E.diagonal().sub_(1)
    H = X.mT @ W
    E2, EH = E @ E, E @ H
    first, second, third = ((a.double() * b).sum() for a, b in ((E, H), (E2, H), (E2, EH)))
    total = float(H.diagonal().double().sum() - first / 2 + 3 / 8 * second - 5 / 16 * third)
    skew = float(torch.linalg.matrix_norm(H - H.mT) / torch.linalg.matrix_norm(H)) / 2
    unreached = FLOOR * largest * float((-E.diagonal().double()).clamp_min(0).sum())
    rounding = 8 * torch.finfo(torch.float32).eps * total
    return total, float(third.abs()) + 4 * skew**2 * total + unreached + rounding


@cache
def _quintics(low: float) -> tuple[tuple[float, float, float], ...]:
    """Coefficients (a, b, c) of ax + bx³ + cx⁵, one triple a step, that take [low, 1] to within
    1e-4 of 1."""
    steps, high = [], 1.0
    while high - low > 1e-4:
        (a, b, c), error = _closest_to_one(low, high)
        steps.append((a, b, c))
        low, high = 1 - error, 1 + error
    return tuple(steps)


def _closest_to_one(low: float, high: float) -> tuple[tuple[float, float, float], float]:
    """((a, b, c), error): the odd quintic closest to 1 on [low, high], by Remez exchange in
    float64."""
    tensor = partial(torch.tensor, dtype=torch.float64, device="cpu")
    inner, signs = tensor([low + (high - low) / 4, low + 3 * (high - low) / 4]), tensor([1.0, -1.0, 1.0, -1.0])
    for _ in range(50):
        x = torch.cat([inner.new_tensor([low]), inner, inner.new_tensor([high])])
        a, b, c, error = torch.linalg.solve(torch.stack([x, x**3, x**5, signs], 1), torch.ones_like(x)).tolist()
        # The extrema inside are where a + 3bx² + 5cx⁴ = 0.
        root = max(9 * b * b - 20 * a * c, 0.0) ** 0.5
        updated = tensor([(-3 * b - root) / (10 * c), (-3 * b + root) / (10 * c)]).sqrt()
        done = bool((updated - inner).abs().max() < 1e-12)
        inner = updated
        if done:
            break
    return (a, b, c), abs(error)
