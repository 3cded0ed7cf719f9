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

from svdtune.methods import kernels


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

    w is r, or 2r where a principal part is taken away, filled up with zero columns to a multiple of `pad`.
    """
    if kernels.available(U, s, V, P0, V0) and not torch.compiler.is_compiling():
        return kernels.stack_factors(U, s, V, P0, V0, dtype, pad)
    P = scaled(U, s)
    A, B = (V, P) if P0 is None else (torch.cat([V, V - V0], -1), torch.cat([P - P0, P0], -1))
    return filled(A, pad).to(dtype), filled(B, pad).to(dtype)


def filled(x: Tensor, pad: int) -> Tensor:
    """x with zero columns appended up to a multiple of `pad`."""
    return F.pad(x, (0, -x.shape[-1] % pad)) if x.shape[-1] % pad else x


def alignment(dtype: torch.dtype, device: torch.device) -> int:
    """The multiple of columns that tensor cores want: 16-bit rows on a GPU are read 16 bytes at a time."""
    return 8 if device.type == "cuda" and dtype.itemsize == 2 else 1


def tall_product(X: Tensor, Q: Tensor, dtype: torch.dtype) -> Tensor:
    """Xᵀ Q in `dtype`; 16-bit products on a GPU leave their fp32 sums unrounded where that is asked for."""
    if X.is_cuda and X.dtype.itemsize == 2 and dtype == torch.float32:
        return torch.mm(X.mT, Q, out_dtype=dtype)
    return (X.mT @ Q).to(dtype)


class LowRankLinear(torch.autograd.Function):
    """A linear layer and its low-rank addition in one node.

    What the addition is added to is either the pair (weight, bias), then the node computes x Wᵀ + b itself, or (None, y),
    then it adds to y in place. For dropout on the low-rank path's input, either `x_adapter` is that input, or `p` > 0 draws
    the mask inside the kernels (CUDA), where neither the mask nor the masked input is ever stored.
    The base weight gets no gradient. Differentiating twice is refused by PyTorch with an error.
    """

    @staticmethod
    def forward(ctx, x, weight, bias_or_output, x_adapter, U, s, V, P0, V0, p):
        dtype = compute_dtype(x)
        pad = alignment(dtype, x.device)
        A, B = stacked(U, s, V, P0, V0, dtype, pad)
        inputs = (x if x_adapter is None else x_adapter).to(dtype)
        flat = inputs.reshape(-1, inputs.shape[-1])
        seed = kernels.dropout_seed(x.device) if p > 0 else None
        z = flat @ A if seed is None else kernels.dropout_mm(flat, A, p, seed)
        if weight is None:
            y = bias_or_output
            ctx.mark_dirty(y)
            y.view(-1, y.shape[-1]).addmm_(z.to(y.dtype), B.to(y.dtype).mT)
        else:
            bias = None if bias_or_output is None else bias_or_output.to(dtype)
            y = linear_plus(x.to(dtype), weight.to(dtype), bias, z, B)
        r = V.shape[1]
        # x V without x (V − V₀), up to the next full column block: what is too much is cut off the product
        projected = z if P0 is None else z[:, : min(z.shape[1], r + -r % pad)].contiguous()
        # The stacked pair is worth keeping where it is small beside x; for long factors forming it again costs less memory.
        kept = (A, B) if A.numel() + B.numel() <= flat.numel() // 8 else (None, None)
        ctx.save_for_backward(flat, projected, weight, U, s, V, P0, V0, seed, *kept)
        ctx.shape, ctx.p = x.shape, p
        ctx.dtypes = (x.dtype, None if x_adapter is None else x_adapter.dtype)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        flat, z, weight, U, s, V, P0, V0, seed, A, B = ctx.saved_tensors
        dtype, r = flat.dtype, V.shape[1]
        pad = alignment(dtype, flat.device)
        if A is None:
            A, B = stacked(U, s, V, P0, V0, dtype, pad)
        needs_x, _, needs_base, needs_adapter, needs_U, needs_s, needs_V, *_ = ctx.needs_input_grad
        dY = grad.to(dtype).reshape(-1, grad.shape[-1])
        Q = dY @ B

        dx = dx_adapter = None
        x_dtype, adapter_dtype = ctx.dtypes
        if needs_adapter:
            dx_adapter = (Q @ A.mT).view(ctx.shape).to(adapter_dtype)
        if needs_x:
            dx = input_gradient(dY, weight, None if adapter_dtype is not None else Q, A, ctx.p, seed)
            dx = None if dx is None else dx.view(ctx.shape).to(x_dtype)

        dU = ds = dV = None
        if needs_V:
            QP = Q if P0 is None else filled(Q[:, :r] + Q[:, r : 2 * r], pad)
            if seed is None:
                dV = tall_product(flat, QP, V.dtype)[:, :r]
            else:
                dV = kernels.dropout_mm_transposed(flat, QP, ctx.p, seed)[:, :r].to(V.dtype)
        if needs_U or needs_s:
            M = tall_product(dY, z, U.dtype)[:, :r]
            ds = None if s is None else (M * U).sum(0).to(s.dtype)
            dU = scaled(M, s)
        dbase = None
        if needs_base:
            dbase = grad if weight is None else dY.sum(0)
        return dx, None, dbase, dx_adapter, dU, ds, dV, None, None, None


def linear_plus(x: Tensor, weight: Tensor, bias: Tensor | None, z: Tensor, B: Tensor) -> Tensor:
    """x Wᵀ + b + z Bᵀ. On a GPU the small product comes first: the large one then adds it while it computes, so the output
    is written twice instead of written, read and written. Elsewhere the large one comes first, exactly as the base's own.
    """
    if x.is_cuda:
        y = z @ B.mT if bias is None else torch.addmm(bias, z, B.mT)
        return y.addmm_(x.reshape(-1, x.shape[-1]), weight.mT).view(*x.shape[:-1], -1)
    y = F.linear(x, weight, bias)
    y.view(-1, y.shape[-1]).addmm_(z, B.mT)
    return y


def input_gradient(
    dY: Tensor, weight: Tensor | None, Q: Tensor | None, A: Tensor, p: float, seed: Tensor | None
) -> Tensor | None:
    """dY W + Q Aᵀ [T, in], either term left out where its factor is None, the second one masked where there is a seed."""
    weight = None if weight is None else weight.to(dY.dtype)
    if seed is not None:
        dx = dY @ weight if weight is not None else torch.zeros_like(dY[:, :1]).expand(-1, len(A)).contiguous()
        return kernels.add_dropout_mm_(dx, Q, A, p, seed)
    if weight is None:
        return None if Q is None else Q @ A.mT
    if Q is None:
        return dY @ weight
    if dY.is_cuda:  # the small product first, as in `linear_plus`
        return (Q @ A.mT).addmm_(dY, weight)
    return (dY @ weight).addmm_(Q, A.mT)


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
    p: float = 0.0,
) -> Tensor:
    """x Wᵀ + b + x (U diag(s) Vᵀ − P₀ V₀ᵀ)ᵀ, the shapes as at the head of this file; x may have leading dimensions.

    Dropout on the input of the second term: give that input as `x_adapter`, or on CUDA its probability as `p`.
    """
    return LowRankLinear.apply(x, weight, bias, x_adapter, U, s, V, P0, V0, p)


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
    return LowRankLinear.apply(x, None, y, None, U, s, V, P0, V0, 0.0)
