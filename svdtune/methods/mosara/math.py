"""Mo-SARA's equations (Gu et al., 2024, §4.3), fast, as one autograd node a layer.

With the paper's U and V exchanged (here W is [out, in], see SARA), U [out, k] and V [in, k] the frozen top-k singular vectors
of W, λ [m, k] the m trained sets of singular values, v the trained diagonal and w₁ [k], w₂ [m] the router:

    g = softmax((x V) w₁ w₂)                                    one weight a token and head, no bias        (Eq. 6)
    y = x Wᵀ + ((g λ) ∘ (x V)) Uᵀ ∘ v                           v after, [out]                              (Eq. 5)
    y = x Wᵀ + ((g λ) ∘ ((x ∘ v) V)) Uᵀ                         v in front, [in] (ablation, Table 4)

v = 0 at the start, so y = x Wᵀ exactly. Without v (ablation) that does not hold. One head has no router: g = 1.

v never meets a [T, out] or [T, in] tensor: it is folded into the frozen factor it stands beside. Eq. 6 reads x V also where v
stands in front; since the gate has rank one, V w₁ [in] is all that it needs.
"""

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from svdtune.methods.lowrank import compute_dtype


class MoSaraLinear(torch.autograd.Function):
    """Eq. 5 and 6 with the base layer: `weight` and `bias`, or None and an output to add to in place.

    Saves x V [T, k], the gate [T, m] and, only where v stands in front, x. The frozen U, V and W get no gradient.
    """

    @staticmethod
    def forward(ctx, x, weight, bias_or_output, x_adapter, U, V, lam, v, w1, w2, front):
        dtype = compute_dtype(x)
        inputs = (x if x_adapter is None else x_adapter).to(dtype)
        flat = inputs.reshape(-1, inputs.shape[-1])
        z = flat @ (scaled_rows(V, v) if front else V).to(dtype)
        a = gate = None
        if w1 is not None:
            a = flat @ (V @ w1).to(dtype) if front else z @ w1.to(dtype)
            gate = torch.softmax(torch.outer(a.to(w2.dtype), w2), 1)
        values = mixed_values(gate, lam).to(dtype)
        if weight is None:
            y = bias_or_output
            ctx.mark_dirty(y)
        else:
            bias = None if bias_or_output is None else bias_or_output.to(dtype)
            y = F.linear(x.to(dtype), weight.to(dtype), bias)
        B = (U if front else scaled_rows(U, v)).to(y.dtype)
        y.view(-1, y.shape[-1]).addmm_((z * values).to(y.dtype), B.mT)
        ctx.save_for_backward(flat if front else None, z, a, gate, weight, U, V, lam, v, w1, w2)
        ctx.front, ctx.shape = front, x.shape
        ctx.dtypes = (x.dtype, None if x_adapter is None else x_adapter.dtype)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        flat, z, a, gate, weight, U, V, lam, v, w1, w2 = ctx.saved_tensors
        front, dtype = ctx.front, z.dtype
        needs_x, _, needs_base, needs_adapter, *_ = ctx.needs_input_grad
        dY = grad.to(dtype).reshape(-1, grad.shape[-1])
        values = mixed_values(gate, lam).to(dtype)
        dt = dY @ (U if front else scaled_rows(U, v)).to(dtype)

        dlam = dw1 = dw2 = dv = da = None
        dz = dt * values
        if gate is None:
            dlam = (dt * z).sum(0, dtype=lam.dtype)[None]
        else:
            dvalues = (dt * z).to(lam.dtype)
            dlam = gate.mT @ dvalues
            dgate = dvalues @ lam.mT
            dlogits = gate * (dgate - (gate * dgate).sum(1, keepdim=True))
            dw2 = a.to(w2.dtype) @ dlogits
            da = dlogits @ w2
            if front:
                dw1 = V.mT.to(w1.dtype) @ (flat.mT.to(w1.dtype) @ da)
            else:
                dw1 = da @ z.to(da.dtype)
                dz = dz.addr_(da.to(dtype), w1.to(dtype))
        if v is not None:
            M = flat.mT @ dz if front else dY.mT @ (z * values)
            dv = (M.to(v.dtype) * (V if front else U)).sum(1, dtype=v.dtype)

        dx = dx_adapter = None
        if needs_x and weight is not None:
            dx = dY @ weight.to(dtype)
        if needs_x or needs_adapter:
            A = (scaled_rows(V, v) if front else V).to(dtype)
            target = None if needs_adapter else dx
            target = dz @ A.mT if target is None else target.addmm_(dz, A.mT)
            if front and da is not None:
                target = target.addr_(da.to(dtype), (V @ w1).to(dtype))
            x_dtype, adapter_dtype = ctx.dtypes
            if needs_adapter:
                dx_adapter = target.view(ctx.shape).to(adapter_dtype)
            elif adapter_dtype is None:
                dx = target
            dx = None if dx is None else dx.view(ctx.shape).to(x_dtype)
        dbase = None
        if needs_base:
            dbase = grad if weight is None else dY.sum(0)
        return dx, None, dbase, dx_adapter, None, None, dlam, dv, dw1, dw2, None


def scaled_rows(factor: Tensor, v: Tensor | None) -> Tensor:
    """diag(v) · factor, or the factor itself where there is no v."""
    return factor if v is None else factor * v[:, None]


def mixed_values(gate: Tensor | None, lam: Tensor) -> Tensor:
    """Σ_i g_i λ_i: [T, k] for a gate [T, m], [1, k] for the one head that has none."""
    return lam if gate is None else gate @ lam


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
    x_adapter: Tensor | None = None,
) -> Tensor:
    """Eq. 5 and 6: x [..., in] → [..., out]; w1 and w2 are None for one head, v is None for the ablation without it."""
    return MoSaraLinear.apply(x, weight, bias, x_adapter, U, V, lam, v, w1, w2, front)


def add_mosara(
    y: Tensor,
    x: Tensor,
    U: Tensor,
    V: Tensor,
    lam: Tensor,
    v: Tensor | None,
    w1: Tensor | None,
    w2: Tensor | None,
    front: bool = False,
) -> Tensor:
    """Eq. 5's second term, added to y [..., out] in place."""
    return MoSaraLinear.apply(x, None, y, None, U, V, lam, v, w1, w2, front)


def mosara_delta(U: Tensor, V: Tensor, lam: Tensor, v: Tensor | None, front: bool = False) -> Tensor:
    """ΔW [out, in] of one head, λ [1, k]. Several heads have none: their weights depend on the token."""
    if front:
        return (U * lam[0]) @ scaled_rows(V, v).mT
    return (scaled_rows(U, v) * lam[0]) @ V.mT


def random_start(k: int, num_heads: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """λ [m, k], w₁ [k] and w₂ [m] as the paper starts them: Kaiming uniform with a = √5, so ±1/√fan_in, in fp32.

    The fan-in of λ (1×k each) and of w₁ is k, that of w₂ is 1. One head has no router.
    """
    bound = 1 / math.sqrt(k)
    lam = torch.empty(num_heads, k).uniform_(-bound, bound)
    if num_heads == 1:
        return lam, None, None
    return lam, torch.empty(k).uniform_(-bound, bound), torch.empty(num_heads).uniform_(-1, 1)


def trainable_parameters(
    k: int, in_features: int, out_features: int, num_heads: int = 5, use_v: bool = True, v_position: str = "after"
) -> int:
    """Parameters trained in one layer: m k + k + m + out, with `in` for v in front, no router for one head."""
    router = k + num_heads if num_heads > 1 else 0
    diagonal = (in_features if v_position == "front" else out_features) if use_v else 0
    return num_heads * k + router + diagonal
