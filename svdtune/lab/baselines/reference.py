"""The baselines' equations written out literally, for tests: nothing here is fast, and nothing else
imports it."""

from collections.abc import Callable

from torch import Tensor


def bottleneck(h: Tensor, D: Tensor, U: Tensor, f: Callable[[Tensor], Tensor], s: float) -> Tensor:
    """A(h) = s · f(h Dᵀ) Uᵀ."""
    return s * (f(h @ D.mT) @ U.mT)


def parallel(
    x: Tensor, W: Tensor, bias: Tensor, D: Tensor, U: Tensor, f: Callable[[Tensor], Tensor], s: float
) -> Tensor:
    """g(x) + A(x)."""
    return x @ W.mT + bias + bottleneck(x, D, U, f, s)


def series(x: Tensor, W: Tensor, bias: Tensor, D: Tensor, U: Tensor, f: Callable[[Tensor], Tensor], s: float) -> Tensor:
    """g(x) + A(g(x)), or g(x + A(x)) where W [out, in] widens."""
    if W.shape[0] > W.shape[1]:
        return (x + bottleneck(x, D, U, f, s)) @ W.mT + bias
    y = x @ W.mT + bias
    return y + bottleneck(y, D, U, f, s)


def dylora(x: Tensor, W: Tensor, bias: Tensor, A: Tensor, B: Tensor, alpha: float, b: int) -> Tensor:
    """x Wᵀ + (α / b) x A[:b]ᵀ B[:, :b]ᵀ."""
    return x @ W.mT + bias + alpha / b * (x @ A[:b].mT @ B[:, :b].mT)
