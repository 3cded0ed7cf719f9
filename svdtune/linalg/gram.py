"""The Gram matrix of a weight over its short side, whose eigenvalues are the squared singular
values."""

import torch
from torch import Tensor

from svdtune.linalg.matrix import tall, working_copy

_ROWS = 4096
_BLOCKS = 8


def gram(weight: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """WᵀW / scale² of a weight [out, in], or WWᵀ where out < in: [n, n], n = min(out, in), in
    `dtype`.

    The long side is taken a slab at a time, so that no copy of the whole weight in `dtype` is made,
    and on the CPU, where products dominate, only the lower block triangle is multiplied, then
    mirrored.
    """
    W = tall(weight)
    n = W.shape[1]
    step = n if weight.is_cuda or n < 512 else -(-n // _BLOCKS)
    G: Tensor | None = None
    for start in range(0, W.shape[0], _ROWS):
        slab = working_copy(W[start : start + _ROWS], scale, dtype)
        if G is None:
            G = torch.zeros(n, n, dtype=dtype, device=slab.device)
        for i in range(0, n, step):
            G[i:, i : i + step].addmm_(slab[:, i:].mT, slab[:, i : i + step])
    assert G is not None
    for i in range(0, n, step):
        G[i : i + step, i + step :] = G[i + step :, i : i + step].mT
    return G


def noise(largest_eigenvalue: float, n: int, dtype: torch.dtype) -> float:
    """Bound on the error of each eigenvalue of a Gram matrix [n, n] computed in `dtype`, by product
    and solver together.

    (16 + 2√n) ε λ₁: over the spectra and shapes of tests/linalg the largest deviation seen in fp32
    is half of that, on flat spectra, and a seventh on decaying ones. Four times as much in float64,
    where the SVD that one compares with errs too.
    """
    margin = 4 if dtype == torch.float64 else 1
    return margin * (16 + 2 * n**0.5) * torch.finfo(dtype).eps * largest_eigenvalue
