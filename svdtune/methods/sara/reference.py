"""SARA as the paper writes it: form ΔW, add it, multiply. For tests alone."""

import torch
from torch import Tensor
from torch.nn import functional as F


def sara_linear(x: Tensor, weight: Tensor, bias: Tensor | None, U: Tensor, lam: Tensor | None, V: Tensor) -> Tensor:
    """Eq. 3, h = x (W₀ + U Λ V), with autograd's own gradients; shapes as in `math.py`."""
    lam = torch.ones_like(V[0]) if lam is None else lam
    return F.linear(x, weight + U @ torch.diag(lam) @ V.mT, bias)


def delta_element(U: Tensor, lam: Tensor, V: Tensor, i: int, j: int) -> float:
    """Eq. 4 for one element: Σ_r u_ir λ_r v_rj."""
    return sum(float(U[i, r]) * float(lam[r]) * float(V[j, r]) for r in range(len(lam)))


def trainable_parameters(k: int, in_features: int, out_features: int, use_lambda: bool = True) -> int:
    """Parameters trained in one layer: k (in + out + 1), without λ k (in + out)."""
    return k * (in_features + out_features + use_lambda)
