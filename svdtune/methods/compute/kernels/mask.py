"""The dropout mask as a function of (seed, row, column): the same bits from PyTorch here and inside
the Triton kernels.

A row and a column are each hashed by a bijection of the 32-bit integers keyed by the seed, so no
two rows and no two columns of a mask coincide. One more multiply-shift-multiply mixes the two, and
the element is dropped where the result is below p·2³². That last step is all that a kernel does for
each element; its high bits depend on all bits of both hashes.
"""

import torch
from torch import Tensor

# The multipliers of the 32-bit mixer "lowbias32" (C. Wellons, public domain), and the golden ratio
# as a 32-bit fraction.
MIX_1, MIX_2, GOLDEN = 0x7FEB352D, 0x846CA68B, 0x9E3779B9
WORD = 0xFFFFFFFF


def dropout_seed(device: torch.device | str) -> Tensor:
    """A fresh seed, int64 of shape [], from PyTorch's generator of that device.

    On the device, so that drawing it is no synchronisation, a CUDA graph draws another one at each
    replay, and activation checkpointing, which restores the generator, sees the same mask again.
    """
    return torch.randint(2**62, (), device=device)


def drop_threshold(p: float) -> int:
    """Hashes below this are dropped: p·2³², rounded."""
    return min(round(p * 2**32), WORD)


def mixed(x: Tensor) -> Tensor:
    """lowbias32: a bijection of the 32-bit integers whose every output bit depends on every input
    bit. int64 in and out."""
    x = x ^ (x >> 16)
    x = (x * MIX_1) & WORD
    x = x ^ (x >> 15)
    x = (x * MIX_2) & WORD
    return x ^ (x >> 16)


def dropout_mask(shape: tuple[int, int], p: float, seed: Tensor, device: torch.device | str) -> Tensor:
    """True where an element is kept: a bool tensor of `shape` (rows, columns), each kept with
    probability 1 − p.

    Args:
        shape: Rows and columns, each below 2³². A smaller mask of the same seed is the corner of a
            larger one.
        p: Probability of dropping, 0 ≤ p < 1.
        seed: int64 of one element, see `dropout_seed`.
    """
    seed = seed.to(device).reshape(())
    row_key = mixed(((seed & WORD) + GOLDEN) & WORD)
    column_key = mixed(((seed >> 32) & WORD) ^ row_key)
    rows = mixed(torch.arange(shape[0], device=device) ^ row_key)
    columns = mixed(torch.arange(shape[1], device=device) ^ column_key)
    x = rows[:, None] ^ columns
    x = (x * MIX_1) & WORD
    x = x ^ (x >> 16)
    x = (x * MIX_2) & WORD
    return x >= drop_threshold(p)
