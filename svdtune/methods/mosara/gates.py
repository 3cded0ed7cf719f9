"""Mo-SARA's gates: what weighs the heads of a token.

"softmax" is the paper's, Eq. 6. "none" weighs every head 1 / m, which is what the softmax gives
where the router tells nothing. The mean of the heads is one set of singular values, so there is no
router, ΔW is a matrix, and it merges. (Their sum would only be another scale.) Gates that are
registered besides these two change the softmax's weights.
"""

from collections.abc import Callable

from torch import Tensor

from svdtune.registry import Registry

# What a gate in the place of the softmax makes of its weights [T, m] of every token.
Gate = Callable[[Tensor], Tensor]
GATES: Registry[Gate | None] = Registry("gates", {"softmax": None, "none": None})


def has_router(num_heads: int, gate: str) -> bool:
    """Whether tokens are mixed by a router: not for one head, and not without a gate."""
    return num_heads > 1 and gate != "none"


def mean_head(lam: Tensor) -> Tensor:
    """λ [m, k] under no gate, as one head [1, k]."""
    return lam.mean(0, keepdim=True)
