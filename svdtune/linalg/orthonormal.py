"""Orthonormal columns: how far a factor is from having them, the step that restores them, and a
convention for their signs."""

import torch
from torch import Tensor


def orthonormality_error(M: Tensor) -> Tensor:
    """‖MᵀM − I‖_F of a matrix [n, r] whose long dimension comes first, as a scalar tensor, in fp32
    or better."""
    M = M if M.dtype == torch.float64 else M.float()
    return torch.linalg.matrix_norm(M.mT @ M - torch.eye(M.shape[-1], dtype=M.dtype, device=M.device))


def polish(M: Tensor) -> Tensor:
    """One Newton–Schulz step towards the nearest matrix with orthonormal columns: an error E of MᵀM
    becomes ¾E²."""
    return torch.addmm(M, M, M.mT @ M, beta=1.5, alpha=-0.5)


def fixed_signs(V: Tensor) -> Tensor:
    """±1 for each column of V [n, r]: the sign of its first entry within 10 % of the largest, so
    that near ties agree."""
    size = V.abs()
    first = (size >= 0.9 * size.amax(0)).to(torch.int8).argmax(0)
    return torch.where(V.gather(0, first[None])[0] < 0, -1.0, 1.0).to(V.dtype)
