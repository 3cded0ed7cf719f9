"""The trained low-rank addition that SARA and SORSA share, as one autograd node a layer.

    y = x Wᵀ + b + x (P Vᵀ − P₀ V₀ᵀ)ᵀ      with P = U diag(s)

x [T, in], W [out, in], U and P₀ [out, r], s [r], V and V₀ [in, r]; P₀ V₀ᵀ is the frozen principal part that SORSA's delta
layout takes away, absent otherwise. The difference is formed in the factors' own precision before anything is rounded:

    P Vᵀ − P₀ V₀ᵀ = (P − P₀) Vᵀ + P₀ (V − V₀)ᵀ

Stacked as A = [V, V − V₀] and B = [P − P₀, P₀] this costs what the plain stacking costs, is exactly zero before the first
step, and in bf16 rounds the change of the weight instead of the difference of two large products.

Against autograd's own bookkeeping the node saves x and x V alone, adds into the outputs of the base matmuls, and makes no
pass over a [T, in] or [T, out] tensor that is not a matrix product.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype a linear layer computes in: autocast's where autocast is on, else the input's."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def scaled(U: Tensor, s: Tensor | None) -> Tensor:
    """P = U diag(s), or U where there is no s."""
    return U if s is None else U * s


def stacked(
    U: Tensor, s: Tensor | None, V: Tensor, P0: Tensor | None, V0: Tensor | None, dtype: torch.dtype, pad: int = 1
) -> tuple[Tensor, Tensor]:
    """The pair A [in, w], B [out, w] with A Bᵀ = (P Vᵀ − P₀ V₀ᵀ)ᵀ, rounded to `dtype` last.

    w is r, or 2r where a principal part is taken away, each r filled up with zero columns to a multiple of `pad`.
    """
    P = scaled(U, s)
    fill = -V.shape[1] % pad
    parts = ([V], [P]) if P0 is None else ([V, V - V0], [P - P0, P0])
    if fill:
        parts = tuple([F.pad(factor, (0, fill)) for factor in side] for side in parts)
    A, B = (side[0] if len(side) == 1 else torch.cat(side, -1) for side in parts)
    return A.to(dtype), B.to(dtype)


def alignment(dtype: torch.dtype, device: torch.device) -> int:
    """The multiple of columns that tensor cores want: 16-bit rows on a GPU are read 16 bytes at a time."""
    return 8 if device.type == "cuda" and dtype.itemsize == 2 else 1


class LowRankLinear(torch.autograd.Function):
    """A linear layer and its low-rank addition in one node.

    `base` is what the addition is added to: either the pair (weight, bias), then the node computes x Wᵀ + b itself, or
    (None, y), then it adds to y in place. `x_adapter` is the input of the low-rank path where it differs from x (dropout).
    The base weight gets no gradient. Differentiating twice is refused by PyTorch with an error.
    """

    @staticmethod
    def forward(ctx, x, weight, bias_or_output, x_adapter, U, s, V, P0, V0):
        dtype = compute_dtype(x)
        A, B = stacked(U, s, V, P0, V0, dtype, alignment(dtype, x.device))
        inputs = (x if x_adapter is None else x_adapter).to(dtype)
        flat = inputs.reshape(-1, inputs.shape[-1])
        z = flat @ A
        if weight is None:
            y = bias_or_output
            ctx.mark_dirty(y)
        else:
            bias = None if bias_or_output is None else bias_or_output.to(dtype)
            y = F.linear(x.to(dtype), weight.to(dtype), bias)
        y.view(-1, y.shape[-1]).addmm_(z.to(y.dtype), B.to(y.dtype).mT)
        projected = z if P0 is None else z[:, : A.shape[1] // 2].contiguous()  # x V, without x (V − V₀)
        # The stacked pair is worth keeping where it is small beside x; for long factors forming it again costs less memory.
        kept = (A, B) if A.numel() + B.numel() <= flat.numel() // 8 else (None, None)
        ctx.save_for_backward(flat, projected, weight, U, s, V, P0, V0, *kept)
        ctx.shape, ctx.dtypes = x.shape, (x.dtype, None if x_adapter is None else x_adapter.dtype)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        flat, z, weight, U, s, V, P0, V0, A, B = ctx.saved_tensors
        dtype = flat.dtype
        if A is None:
            A, B = stacked(U, s, V, P0, V0, dtype, alignment(dtype, flat.device))
        needs_x, _, needs_base, needs_adapter, needs_U, needs_s, needs_V, *_ = ctx.needs_input_grad
        dY = grad.to(dtype).reshape(-1, grad.shape[-1])
        Q = dY @ B

        dx = dx_adapter = None
        x_dtype, adapter_dtype = ctx.dtypes
        if needs_x and weight is not None:
            dx = dY @ weight.to(dtype)
        if needs_adapter:
            dx_adapter = (Q @ A.mT).view(ctx.shape).to(adapter_dtype)
        elif needs_x and adapter_dtype is None:
            dx = Q @ A.mT if dx is None else dx.addmm_(Q, A.mT)
        dx = None if dx is None else dx.view(ctx.shape).to(x_dtype)

        dU = ds = dV = None
        r = V.shape[1]
        if needs_V:
            half = A.shape[1] // 2
            QP = Q if P0 is None else Q[:, :half] + Q[:, half:]
            dV = (flat.mT @ QP)[:, :r].to(V.dtype)
        if needs_U or needs_s:
            M = (dY.mT @ z)[:, :r].to(U.dtype)
            ds = None if s is None else (M * U).sum(0).to(s.dtype)
            dU = scaled(M, s)
        dbase = None
        if needs_base:
            dbase = grad if weight is None else dY.sum(0)
        return dx, None, dbase, dx_adapter, dU, ds, dV, None, None


def low_rank_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    U: Tensor,
    s: Tensor | None,
    V: Tensor,
    P0: Tensor | None = None,
    V0: Tensor | None = None,
    x_adapter: Tensor | None = None,
) -> Tensor:
    """x Wᵀ + b + x (U diag(s) Vᵀ − P₀ V₀ᵀ)ᵀ, the shapes as at the head of this file; x may have leading dimensions."""
    return LowRankLinear.apply(x, weight, bias, x_adapter, U, s, V, P0, V0)


def add_low_rank(
    y: Tensor,
    x: Tensor,
    U: Tensor,
    s: Tensor | None,
    V: Tensor,
    P0: Tensor | None = None,
    V0: Tensor | None = None,
) -> Tensor:
    """y + x (U diag(s) Vᵀ − P₀ V₀ᵀ)ᵀ, added to y in place: for base layers whose weight must not be read directly."""
    return LowRankLinear.apply(x, None, y, None, U, s, V, P0, V0)


def paired_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, x_adapter: Tensor | None = None
) -> Tensor:
    """x Wᵀ + b + (x A) Bᵀ from plain PyTorch operations, for a pair [in, w], [out, w] that a `FactorBank` made."""
    dtype = A.dtype
    flat = x.reshape(-1, x.shape[-1]).to(dtype)
    y = F.linear(flat, weight.to(dtype), None if bias is None else bias.to(dtype))
    z = (flat if x_adapter is None else x_adapter.reshape(flat.shape).to(dtype)) @ A
    return y.addmm_(z, B.mT).view(*x.shape[:-1], -1)
