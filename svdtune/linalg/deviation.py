"""How far a weight has moved from its start, in terms of its singular value decomposition.

SORSA's ΔΣ and ΔD (Eq. 7–10) pair singular vectors by their index. If two close singular values
change places, the vectors of both indices turn by 90°, and ΔD jumps although the weight hardly
moved. The angle between the subspaces of the leading vectors has no such jump, provided that the
subspace ends at a gap of the spectrum. Both are given.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from svdtune.linalg.factors import Factors, top_factors
from svdtune.linalg.matrix import largest_entry

# Up to this short side a sample is cut out of the whole decomposition.
_WHOLE = 1024
# The subspace whose angle is measured has at most so many dimensions, and at least half as many.
SUBSPACE = 16


class Deviation(NamedTuple):
    """What changed between two weights.

    Attributes:
        delta_sigma: ΔΣ, the mean |σ_t − σ_0|, in the weight's own unit.
        delta_d: ΔD in [0, 1], the mean turn of singular vectors paired by index; 0 for none.
        angle: the largest principal angle between the leading subspaces, in degrees, of left or
            right vectors.
        k: how many triplets ΔΣ and ΔD compare.
        p: the dimension of the subspaces.
    """

    delta_sigma: float
    delta_d: float
    angle: float
    k: int
    p: int


def compared_factors(weight: Tensor, k: int | None = None) -> Factors:
    """The singular triplets of a weight [out, in] that a deviation compares, in fp32 on the CPU.

    Args:
        weight: on any device; all of its triplets are found on the CPU, as the paper has it.
        k: how many leading ones, a sample where it is less than min(out, in); by default all of
            them, the paper's k. The sample of a side above 1024 is found on the weight's device. It
            says less than the paper's ΔD: a change of low rank turns the vectors of small values
            most.

    Raises:
        SvdtuneError: `weight` is not a finite matrix.
    """
    n = min(weight.shape, default=0)
    k = min(k or n, n)
    if k < n and n > _WHOLE:
        return Factors(*(factor.cpu() for factor in top_factors(weight, k)))
    largest_entry(weight)
    U, s, Vh = torch.linalg.svd(weight.detach().cpu().float(), full_matrices=False)
    return Factors(U[:, :k].contiguous(), s[:k], Vh[:k].contiguous())


def deviation(start: Factors, now: Factors) -> Deviation:
    """ΔΣ, ΔD and the subspace angle between two weights of one shape, from as many leading triplets
    of each."""
    k, p = len(start.s), subspace_size(start.s)
    angle = max(
        subspace_angle(start.U[:, :p], now.U[:, :p]),
        subspace_angle(start.Vh[:p].mT, now.Vh[:p].mT),
    )
    return Deviation(delta_sigma(start.s, now.s), delta_d(start, now), angle, k, p)


def delta_sigma(start: Tensor, now: Tensor) -> float:
    """ΔΣ_t = Σ_i |σ_t^i − σ_0^i| / k for singular values [k] (SORSA Eq. 7)."""
    return float((now.double() - start.double()).abs().mean())


def delta_d(start: Factors, now: Factors) -> float:
    """ΔD_t = 1 − Σ_i (|⟨u_t^i, u_0^i⟩| + |⟨v_t^i, v_0^i⟩|) / 2k (SORSA Eq. 8–10)."""
    left = (start.U.double() * now.U.double()).sum(0).abs()
    right = (start.Vh.double() * now.Vh.double()).sum(1).abs()
    return max(0.0, float(1 - (left + right).mean() / 2))


def subspace_size(values: Tensor) -> int:
    """Where to cut descending singular values [k]: at the widest relative gap after the 8th to the
    16th (k/4 to k/2 if fewer).

    A subspace that ends at a gap turns by at most about ‖ΔW‖ / gap (Wedin); one that ends between
    two equal values may turn by anything.
    """
    most = max(1, min(SUBSPACE, len(values) // 2))
    least = max(1, most // 2)
    following = torch.cat([values, values.new_zeros(1)])[least : most + 1]
    ratios = values[least - 1 : most] / following.clamp_min(torch.finfo(values.dtype).tiny)
    return least + int(ratios.argmax())


def subspace_angle(first: Tensor, second: Tensor) -> float:
    """The largest principal angle, in degrees, between the spans of two orthonormal bases [n, p].

    From sine and cosine both, so that angles near 0° and near 90° keep their digits.
    """
    first, second = first.double(), second.double()
    common = first.mT @ second
    sine = float(torch.linalg.matrix_norm(second - first @ common, 2))
    cosine = float(torch.linalg.svdvals(common)[-1])
    return math.degrees(math.atan2(sine, cosine))


def product_values(A: Tensor, B: Tensor) -> Tensor:
    """The w singular values, descending, of B Aᵀ for A [in, w] and B [out, w], w at most both;
    float64, never forming it."""
    A, B = A.detach().double(), B.detach().double()
    return torch.linalg.svdvals(torch.linalg.qr(B).R @ torch.linalg.qr(A).R.mT)


def condition_number(values: Tensor) -> float:
    """σ_max / σ_min of descending singular values; infinite if the last is 0 to float64's
    rounding."""
    first, last = float(values[0]), float(values[-1])
    return first / last if last > first * len(values) * torch.finfo(torch.float64).eps else math.inf
