"""Mo-SARA's gates: what weighs the heads of a token.

"softmax" is the paper's, Eq. 6. "none" weighs every head 1 / m, which is what the softmax gives
where the router tells nothing. The mean of the heads is one set of singular values, so there is no
router, ΔW is a matrix, and it merges. (Their sum would only be another scale.) Gates that are
registered besides these two bring the code that computes with them.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from svdtune.registry import Registry


@dataclass(frozen=True)
class Gate:
    """A gate in the place of Eq. 6's softmax.

    Attributes:
        weights: what it makes of the softmax's weights [T, m] of every token.
        linear: Eq. 5 with it; takes what `math.mosara_linear` takes, but for `V_ready` and `keep`.
        add: Eq. 5's second term with it, not in place; takes what `math.add_mosara` takes, but for
            `keep`.
    """

    weights: Callable[[Tensor], Tensor]
    linear: Callable[..., Tensor]
    add: Callable[..., Tensor]


GATES: Registry[Gate | None] = Registry("gates", {"softmax": None, "none": None})


def has_router(num_heads: int, gate: str) -> bool:
    """Whether tokens are mixed by a router: not for one head, and not without a gate."""
    return num_heads > 1 and gate != "none"


def mean_head(lam: Tensor) -> Tensor:
    """λ [m, k] under no gate, as one head [1, k]."""
    return lam.mean(0, keepdim=True)
