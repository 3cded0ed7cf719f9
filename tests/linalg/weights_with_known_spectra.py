"""Weights whose singular values are known by construction."""

import torch
from torch import Tensor


def weight_with(values: Tensor, out_features: int, in_features: int, seed: int = 0) -> Tensor:
    """A float64 weight [out, in] with the given singular values [min(out, in)] and random singular
    vectors."""
    generator = torch.Generator().manual_seed(seed)
    U, V = (
        torch.linalg.qr(torch.randn(size, len(values), generator=generator, dtype=torch.float64)).Q
        for size in (out_features, in_features)
    )
    return (U * values) @ V.mT


def llama_like(n: int) -> Tensor:
    """Values [n] whose ranks at 0.01, 0.09 and 0.5 are those the papers imply for LLaMA-7B: 9, 107,
    907 at n = 4096."""
    i = torch.arange(1, n + 1, dtype=torch.float64)
    return torch.exp(-2.8 * (i / n) ** 0.8) + 0.8 * i**-0.5


def spectra(n: int) -> dict[str, Tensor]:
    """Descending values [n] of every kind that has ever broken an SVD."""
    i = torch.arange(1, n + 1, dtype=torch.float64)
    return {
        "flat": torch.ones_like(i),
        "power": 1 / i,
        "llama": llama_like(n),
        "exponential": torch.exp(-20 * i / n),
        "deficient": torch.where(i <= n // 3, 1 / i.sqrt(), 0.0),
        "repeated": torch.where(i <= n // 2, 3.0, torch.where(i <= 3 * n // 4, 2.0, 1.0)),
        "huge": torch.where(i == 1, 1e4, 1.0),
    }
