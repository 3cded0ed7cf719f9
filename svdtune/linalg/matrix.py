"""What every routine here does first: check a weight, scale it, and put it in full precision on a
device that can."""

import math

import torch
from torch import Tensor

from svdtune.errors import SvdtuneError


def check_threshold(threshold: float) -> None:
    """Raise `SvdtuneError` unless 0 < threshold <= 1."""
    if not (math.isfinite(threshold) and 0 < threshold <= 1):
        raise SvdtuneError(f"threshold must lie in (0, 1], the share of the sum of singular values; got {threshold}")


def check_rank(r: int, shape: torch.Size) -> None:
    """Raise `SvdtuneError` unless 1 <= r <= min(shape)."""
    if not 1 <= r <= min(shape):
        raise SvdtuneError(f"r = {r} is outside 1 … {min(shape)}, the ranks that a weight {tuple(shape)} can have")


def largest_entry(weight: Tensor) -> float:
    """The largest magnitude in a weight [out, in].

    Raises:
        SvdtuneError: the weight is not a matrix, is empty, has no values, is not floating point, or
            holds NaN or infinity.
    """
    if weight.ndim != 2 or weight.numel() == 0:
        raise SvdtuneError(f"a weight must be a non-empty matrix [out, in]; this one has shape {tuple(weight.shape)}")
    if weight.is_meta:
        raise SvdtuneError("the weight is on the meta device and has no values; load it before decomposing it")
    if not weight.is_floating_point():
        raise SvdtuneError(f"a weight must be floating point, not {weight.dtype}; dequantize it first")
    largest = magnitude(weight)
    if not math.isfinite(largest):
        raise SvdtuneError("the weight holds NaN or infinity, so it has no singular values; check the checkpoint")
    return largest


def magnitude(weight: Tensor) -> float:
    """The largest magnitude in a weight that has entries: NaN where one of them is, or infinite."""
    if weight.element_size() == 1:
        weight = weight.float()
    return float(torch.stack(torch.aminmax(weight.detach())).abs().max())


def tall(weight: Tensor) -> Tensor:
    """The weight or its transpose, whichever has the short side last: a view [m, n], m >= n."""
    return weight if weight.shape[0] >= weight.shape[1] else weight.mT


def power_of_two(largest: float) -> float:
    """The power of two at or below `largest`, clamped so that it and its inverse are finite in
    fp32; 1, which spares a copy, where that is near.

    Dividing by it is exact, and keeps squares of very large or very small weights inside the range
    of fp32.
    """
    exponent = math.frexp(largest)[1] - 1
    return 1.0 if abs(exponent) <= 16 else 2.0 ** max(-120, min(120, exponent))


def working_copy(weight: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """weight / scale in `dtype`, on its own device, or on CPU where that device has no float64."""
    device = weight.device if weight.device.type in ("cpu", "cuda") else "cpu"
    weight = weight.detach().to(device)
    weight = weight.to(dtype)
    return weight if scale == 1.0 else weight / scale
