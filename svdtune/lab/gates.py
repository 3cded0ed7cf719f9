"""A gate that the paper does not have, as a control for its softmax: top-1 routing.

"top1" keeps the head whose weight in Eq. 6 is the largest, with that weight, and drops the others.
The weight is a softmax over all heads still, so that the router gets a gradient (Fedus et al.,
2022, Switch Transformers, Eq. 2). Eq. 6 has rank one: its logits are a w₂ with one number a for
each token, so the largest is where w₂ is largest if a > 0 and where it is smallest if a < 0. At any
moment no more than these two heads are in use, whatever m is.
"""

import torch
from torch import Tensor

from svdtune.methods.mosara.gates import GATES


def top1(weights: Tensor) -> Tensor:
    """Of the weights [T, m] of every token, the largest; 0 for the others."""
    values, heads = weights.max(1, keepdim=True)
    return torch.zeros_like(weights).scatter(1, heads, values)


GATES.add("top1", top1)
