"""Mo-SARA as the paper writes it, term by term, with autograd's own gradients. For tests alone."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F


def gate(x: Tensor, V: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """Eq. 6, softmax(x U_k · (W_g1 W_g2)): [T, m] for x [T, in]."""
    return torch.softmax((x @ V) @ (w1[:, None] @ w2[None, :]), dim=-1)


def mosara_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    U: Tensor,
    V: Tensor,
    lam: Tensor,
    v: Tensor | None,
    w1: Tensor | None,
    w2: Tensor | None,
    front: bool = False,
    changed: Callable[[Tensor], Tensor] = lambda g: g,
) -> Tensor:
    """Eq. 5 for x [T, in], with a diagonal matrix of its own for every token; shapes as in
    `math.py`.

    Another gate is what it makes of the softmax's weights, `changed`.
    """
    g = torch.full((len(x), len(lam)), 1 / len(lam), dtype=x.dtype) if w1 is None or w2 is None else gate(x, V, w1, w2)
    rows = []
    for token, weights in zip(x, changed(g), strict=True):
        values = sum(weights[i] * torch.diag(lam[i]) for i in range(len(lam)))
        scaled = token if v is None or not front else token @ torch.diag(v)
        h = scaled @ V @ values @ U.mT
        rows.append(h if v is None or front else h @ torch.diag(v))
    return F.linear(x, weight, bias) + torch.stack(rows)


def trainable_parameters(
    k: int,
    in_features: int,
    out_features: int,
    num_heads: int = 5,
    use_v: bool = True,
    v_position: str = "after",
    gate: str = "softmax",
) -> int:
    """Parameters trained in one layer: m k + k + m + out, with `in` for v in front, no router for
    one head or no gate."""
    router = k + num_heads if num_heads > 1 and gate != "none" else 0
    diagonal = (in_features if v_position == "front" else out_features) if use_v else 0
    return num_heads * k + router + diagonal
