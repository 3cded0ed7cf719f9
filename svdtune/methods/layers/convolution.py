"""A low-rank addition to a convolution: a convolution with A as its kernel, then one with B that
looks at single positions.

A kernel [out, in / groups, k, ...] is the matrix W [out, in / groups · k ...] that multiplies each
patch of the input, so ΔW = B Aᵀ applied to every patch is

    y = base(x) + B (A ∗ x)      A [in / groups · k ..., w] as w kernels, B [out, w] of size 1

and no patch is ever copied out. Stride, padding and dilation are the base layer's, all of them A's.
With groups, every group of channels goes through A by itself and meets its own rows of B.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from svdtune.methods.compute.lowrank import compute_dtype

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d

_CONVOLVE: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def kernel_of(base: Convolution) -> dict[str, Any]:
    """What a convolution's kernel looks at, as a configuration records it."""
    return {
        "groups": base.groups,
        "shape": list(base.weight.shape[1:]),
        "dilation": list(base.dilation),
        "padding_mode": base.padding_mode,
    }


def project(base: Convolution, x: Tensor, A: Tensor) -> Tensor:
    """A ∗ x: [N, groups · w, positions ...] for x [N, in, ...] and A [in / groups · k ..., w]."""
    dtype = compute_dtype(x)
    kernel = A.mT.reshape(-1, *base.weight.shape[1:]).to(dtype)
    if base.groups > 1:
        kernel = kernel.repeat(base.groups, *(1,) * (kernel.dim() - 1))
    return base._conv_forward(x.to(dtype), kernel, None)


def expand(base: Convolution, z: Tensor, B: Tensor) -> Tensor:
    """B z at every position: [N, out, positions ...] for z [N, groups · w, positions ...] and B
    [out, w]."""
    size = len(base.kernel_size)
    return _CONVOLVE[size](z, B.reshape(*B.shape, *(1,) * size).to(z.dtype), groups=base.groups)


def add_convolved(base: Convolution, y: Tensor, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """y + B (A ∗ x), in the dtype of y."""
    return y + expand(base, project(base, x, A), B).to(y.dtype)


def per_position(z: Tensor, groups: int, sizes: int) -> Tensor:
    """[N, groups · w, positions ...] → [N, groups, positions ..., w], so that what a router reads
    comes last.

    `sizes` is the number of position dimensions; an input without N is taken as well.
    """
    return z.unflatten(-sizes - 1, (groups, -1)).movedim(-sizes - 1, -1)


def as_channels(rows: Tensor, sizes: int) -> Tensor:
    """What `per_position` took apart, put together again."""
    return torch.movedim(rows, -1, -sizes - 1).flatten(-sizes - 2, -sizes - 1)
