"""A gate that the paper does not have, as a control for its softmax: top-1 routing. PyTorch's own
autograd throughout.

"top1" keeps the head whose weight in Eq. 6 is the largest, with that weight, and drops the others.
The weight is a softmax over all heads still, so that the router gets a gradient (Fedus et al.,
2022, Switch Transformers, Eq. 2). Eq. 6 has rank one: its logits are a w₂ with one number a for
each token, so the largest is where w₂ is largest if a > 0 and where it is smallest if a < 0. At any
moment no more than these two heads are in use, whatever m is.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from svdtune.methods.compute.lowrank import compute_dtype, filled
from svdtune.methods.mosara.gates import GATES, Gate
from svdtune.methods.mosara.math import mixed_values, projections, token_gate


def top1(weights: Tensor) -> Tensor:
    """Of the weights [T, m] of every token, the largest; 0 for the others."""
    values, heads = weights.max(1, keepdim=True)
    return torch.zeros_like(weights).scatter(1, heads, values)


def top1_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    U: Tensor,
    V: Tensor,
    lam: Tensor,
    v: Tensor | None,
    w1: Tensor,
    w2: Tensor,
    front: bool = False,
    x_adapter: Tensor | None = None,
) -> Tensor:
    """Eq. 5 with a top-1 gate: x [..., in] → [..., out], as `math.mosara_linear`."""
    dtype = compute_dtype(x)
    y = F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    return add_top1(y, x if x_adapter is None else x_adapter, U, V, lam, v, w1, w2, front)


def add_top1(
    y: Tensor,
    x: Tensor,
    U: Tensor,
    V: Tensor,
    lam: Tensor,
    v: Tensor | None,
    w1: Tensor,
    w2: Tensor,
    front: bool = False,
) -> Tensor:
    """y [..., out] with Eq. 5's second term under a top-1 gate, not in place."""
    dtype = compute_dtype(x)
    flat = x.to(dtype).reshape(-1, x.shape[-1])
    A, B = projections(U, V, v, front, dtype, None)
    z = flat @ A
    # Eq. 6 reads x V without v.
    a = flat @ (V @ w1.to(V.dtype)).to(dtype) if front else z @ filled(w1[None], z.shape[1])[0].to(dtype)
    gate = top1(token_gate(a, w2))
    t = z * filled(mixed_values(gate, lam.to(gate.dtype)), z.shape[1]).to(dtype)
    return y + (t @ B.mT).view(y.shape).to(y.dtype)


GATES.add("top1", Gate(top1, top1_linear, add_top1))
