"""Singular values of a weight with a bound on their error, and the rank that reaches a share of their sum."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from svdtune.errors import SvdtuneError


@dataclass(frozen=True)
class Spectrum:
    """The singular values of a weight.

    Attributes:
        values: float64 on CPU, descending, length min(out, in).
        total: their sum, the nuclear norm.
        error: bound on the absolute error of each value, of every partial sum and of `total`.
    """

    values: Tensor
    total: float
    error: float


def check_matrix(weight: Tensor) -> None:
    """Raise `SvdtuneError` unless `weight` is a finite, non-empty, readable matrix."""
    if weight.ndim != 2 or weight.numel() == 0:
        raise SvdtuneError(f"a weight must be a non-empty matrix [out, in]; this one has shape {tuple(weight.shape)}")
    if weight.is_meta:
        raise SvdtuneError("the weight is on the meta device and has no values; load it before decomposing it")
    if not weight.is_floating_point():
        raise SvdtuneError(f"a weight must be floating point, not {weight.dtype}; dequantize it first")
    if not torch.isfinite(weight).all():
        raise SvdtuneError("the weight holds NaN or infinity, so it has no singular values; check the checkpoint")


def check_threshold(threshold: float) -> None:
    """Raise `SvdtuneError` unless 0 < threshold <= 1."""
    if not (math.isfinite(threshold) and 0 < threshold <= 1):
        raise SvdtuneError(f"threshold must lie in (0, 1], the share of the sum of singular values; got {threshold}")


def spectrum(weight: Tensor, *, dtype: torch.dtype | None = None) -> Spectrum:
    """All singular values of a weight [out, in], by LAPACK's SVD in float64.

    Raises:
        SvdtuneError: `weight` is not a finite matrix.
    """
    check_matrix(weight)
    values = torch.linalg.svdvals(weight.detach().cpu().to(torch.float64)).clamp_min(0)
    error = float(values[0]) * len(values) * torch.finfo(torch.float64).eps
    return Spectrum(values, float(values.sum()), error)


def rank_at_threshold(values: Tensor | Spectrum, threshold: float) -> int:
    """SARA Algorithm 1: the least k >= 1 whose first k values sum to at least `threshold` of the whole sum.

    The listing compares with `threshold` itself where `threshold` times the sum is meant. A zero weight has rank 1.

    Raises:
        SvdtuneError: `threshold` outside (0, 1], or values that are empty or not finite.
    """
    check_threshold(threshold)
    if isinstance(values, Spectrum):
        values = values.values
    values = values.detach().to("cpu", torch.float64)
    if values.ndim != 1 or len(values) == 0 or not torch.isfinite(values).all():
        raise SvdtuneError(f"singular values must be a non-empty finite vector; got shape {tuple(values.shape)}")
    partial = values.cumsum(0)
    reached = partial >= threshold * partial[-1]
    return int(reached.nonzero()[0]) + 1


def safe_rank(weight: Tensor, threshold: float) -> int:
    """The rank at a threshold of a weight [out, in], equal to the one that a float64 SVD gives."""
    check_threshold(threshold)
    return rank_at_threshold(spectrum(weight), threshold)
