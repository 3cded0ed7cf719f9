"""Gram matrices of trained factors, in a precision that does not depend on how a factor is stored
or what the user allowed.

Factors of one rank stand one under the other in one tensor, so that a pass over all of them is one
kernel, and a product one for each length.
"""

import functools
from collections.abc import Iterator, Sequence
from itertools import groupby

import torch
from torch import Tensor

from svdtune.linalg.precision import ieee


def of_one_length(stacked: Tensor, lengths: Sequence[int]) -> Iterator[tuple[slice, Tensor]]:
    """Neighbours of one length d in `stacked` [Σ lengths, r]: their places among the factors, and a
    view of them, [n, d, r]."""
    first = row = 0
    for length, alike in groupby(lengths):
        count = len(list(alike))
        yield slice(first, first + count), stacked[row : row + count * length].view(count, length, stacked.shape[1])
        first, row = first + count, row + count * length


def gram(stacked: Tensor, lengths: Sequence[int]) -> Tensor:
    """MᵀM [n, r, r] of n factors M [d, r], one under the other, in fp64 wherever the device has it.

    Straight after an SVD MᵀM − I is of the size of fp32's rounding. In fp64 it, and with it the
    direction of the penalty's gradient, follows from the factors alone, not from the order of a
    sum: sharded factors give what whole ones give. A GPU with few fp64 units multiplies in fp32,
    and as exactly.
    """
    with ieee(stacked.device):
        if stacked.device.type == "mps":
            return _products(stacked.float(), stacked.float(), lengths)
        if stacked.dtype != torch.float64 and has_few_fp64_units(stacked.device):
            return _split_gram(stacked.float(), lengths)
        exact = stacked.double()
        return _products(exact, exact, lengths)


def _products(left: Tensor, right: Tensor, lengths: Sequence[int]) -> Tensor:
    """LᵀR [n, r, r] of the factors in `left` and `right`."""
    found = left.new_empty(len(lengths), left.shape[1], left.shape[1])
    for (places, L), (_, R) in zip(of_one_length(left, lengths), of_one_length(right, lengths), strict=True):
        torch.bmm(L.mT, R, out=found[places])
    return found


def _split_gram(M: Tensor, lengths: Sequence[int]) -> Tensor:
    """MᵀM in fp64 by fp32 products alone, M = C + D + F (Ozaki's scheme on a fixed grid).

        MᵀM = CᵀC + DᵀD + X + Xᵀ        X = CᵀD + (M − F/2)ᵀF

    C holds multiples of 2⁻¹¹, D multiples of 2⁻¹⁷ of what is left, F the rest, at most 2⁻¹⁸. For
    columns no longer than 2 and up to 28,672 rows every partial sum of CᵀC, CᵀD and DᵀD is a
    multiple of 2⁻²², 2⁻²⁸ or 2⁻³⁴ that fits into 24 bits, hence exact. Rounded are the products
    with F alone, by some 1e-12; E of factors straight after an SVD has elements of 1e-10 to 1e-9.
    """
    C = _to_grid(M, 11)
    D = _to_grid(M - C, 17)
    F = M - C - D
    X = _products(C, D, lengths).double() + _products(M - F / 2, F, lengths)
    return _products(C, C, lengths).double() + _products(D, D, lengths) + X + X.mT


def _to_grid(x: Tensor, bits: int) -> Tensor:
    """x rounded to multiples of 2^-bits: fp32 numbers near 1.5 · 2^(23 − bits) are that far
    apart."""
    shift = 1.5 * 2.0 ** (23 - bits)
    return (x + shift).sub_(shift)


@functools.cache
def has_few_fp64_units(device: torch.device) -> bool:
    """Whether a GPU computes in fp64 at a 32nd or less of its fp32 rate, as all do but NVIDIA's of
    compute capability 6.0, 7.0, 8.0, 9.0 and 10.0, and AMD's CDNA (9.x)."""
    if device.type != "cuda":
        return False
    major, minor = torch.cuda.get_device_capability(device)
    return major != 9 and (major, minor) not in ((6, 0), (7, 0), (8, 0), (10, 0))
