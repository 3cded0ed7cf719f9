"""SORSA as the paper writes it: form W_p, add it to W_r, multiply. For tests and the benchmark's
literal form alone."""

import torch
from torch import Tensor
from torch.nn import functional as F


def sorsa_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    U: Tensor,
    s: Tensor,
    V: Tensor,
    P0: Tensor | None = None,
    V0: Tensor | None = None,
) -> Tensor:
    """Eq. 3, x (W_r + U_p diag(S_p) V_pᵀ), with autograd's own gradients; shapes as in
    `math.py`."""
    residual = weight if P0 is None or V0 is None else weight - P0 @ V0.mT
    return F.linear(x, residual + U @ torch.diag(s) @ V.mT, bias)


def orthonormal_regularizer(U: Tensor, V: Tensor) -> Tensor:
    """Eq. 4 for one layer: ‖UᵀU − I‖_F + ‖VᵀV − I‖_F, differentiable."""

    def error(M: Tensor) -> Tensor:
        return torch.linalg.matrix_norm(M.mT @ M - torch.eye(M.shape[1], dtype=M.dtype, device=M.device))

    return error(U) + error(V)


def trainable_parameters(r: int, in_features: int, out_features: int) -> int:
    """Parameters trained in one layer: r (in + out + 1)."""
    return r * (in_features + out_features + 1)
