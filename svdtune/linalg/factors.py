"""The leading singular factors of a weight, with fixed signs."""

from typing import NamedTuple

import torch
from torch import Tensor

from svdtune.errors import SvdtuneError
from svdtune.linalg.spectrum import check_matrix


class Factors(NamedTuple):
    """U [out, r], s [r], Vh [r, in] in fp32: weight ≈ U · diag(s) · Vh, s descending and >= 0."""

    U: Tensor
    s: Tensor
    Vh: Tensor


def top_factors(weight: Tensor, r: int) -> Factors:
    """The r leading singular triplets of a weight [out, in], by LAPACK's SVD in float64.

    Raises:
        SvdtuneError: r outside 1 … min(out, in), or `weight` is not a finite matrix.
    """
    check_matrix(weight)
    if not 1 <= r <= min(weight.shape):
        raise SvdtuneError(f"r = {r} is outside 1 … {min(weight.shape)}, the rank a weight {tuple(weight.shape)} can have")
    U, s, Vh = torch.linalg.svd(weight.detach().to(torch.float64), full_matrices=False)
    U, s, Vh = U[:, :r], s[:r], Vh[:r]
    signs = fixed_signs(Vh)
    return Factors((U * signs).float().contiguous(), s.float(), (Vh * signs[:, None]).float().contiguous())


def fixed_signs(Vh: Tensor) -> Tensor:
    """±1 for each row of Vh [r, in]: that of its first entry within 10 % of the largest, so that near ties agree."""
    size = Vh.abs()
    first = (size >= 0.9 * size.amax(1, keepdim=True)).to(torch.int8).argmax(1)
    return torch.where(Vh.gather(1, first[:, None])[:, 0] < 0, -1.0, 1.0).to(Vh.dtype)


def orthonormality_error(M: Tensor) -> Tensor:
    """‖MᵀM − I‖_F of a matrix [n, r] whose long dimension comes first, computed in fp32 or better."""
    M = M if M.dtype == torch.float64 else M.float()
    return torch.linalg.matrix_norm(M.mT @ M - torch.eye(M.shape[-1], dtype=M.dtype, device=M.device))
