"""Mo-SARA's equations (Gu et al., 2024, §4.3), as its layer calls them: one autograd node a layer.

With the paper's U and V exchanged (here W is [out, in], see SARA), U [out, k] and V [in, k] the
frozen top-k singular vectors of W, λ [m, k] the m trained sets of singular values, v the trained
diagonal and w₁ [k], w₂ [m] the router:

    g = softmax((x V) w₁ w₂)                      one weight a token and head     (Eq. 6)
    y = x Wᵀ + ((g λ) ∘ (x V)) Uᵀ ∘ v             v after, [out]                  (Eq. 5)
    y = x Wᵀ + ((g λ) ∘ ((x ∘ v) V)) Uᵀ           v in front, [in]                (Table 4)

v = 0 at the start, so y = x Wᵀ exactly. Without v (ablation) that does not hold. One head has no
router: g = 1.

v never meets a [T, out] or [T, in] tensor: it is folded into the frozen factor it stands beside.
Eq. 6 reads x V also where v stands in front; since the gate has rank one, V w₁ [in] is all that it
needs.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from svdtune.methods.compute import kernels
from svdtune.methods.compute.lowrank import add_product, base_in_plain, compute_dtype, filled
from svdtune.methods.compute.together import Keep
from svdtune.methods.compute.transforms import under_transform
from svdtune.methods.mosara.gates import Gate

# k is filled up to a multiple of this on a GPU: with 914 columns instead of 960 a product takes
# three times as long.
COLUMNS = 64


class Terms(NamedTuple):
    """What Eq. 5 and 6 take of a layer beside its weight: w₁ and w₂ are None for one head, v is
    None for the ablation without it, and `front` says where v stands."""

    U: Tensor
    V: Tensor
    lam: Tensor
    v: Tensor | None
    w1: Tensor | None
    w2: Tensor | None
    front: bool = False


class GatedLinear(torch.autograd.Function):
    """Eq. 5 and 6 with the base layer: `weight` and `bias`, or None and an output to add to in
    place.

    Saves x V [T, k], the gate [T, m] and, only where v stands in front, x. The frozen U, V and W
    get no gradient. `V_ready` is V as `ready` gives it, where the caller keeps that. k is filled up
    with zero columns to what tensor cores read; they add nothing and are cut off the gradients.
    `values` are those of `Terms`, one by one, since autograd sees no tensors inside a tuple.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias_or_output: Tensor | None,
        x_adapter: Tensor | None,
        V_ready: Tensor | None,
        *values: Any,
    ) -> Tensor:
        dtype, terms = compute_dtype(x), Terms(*values)
        flat = _rows(x if x_adapter is None else x_adapter, dtype)
        A, B, read = _readied(terms, dtype, V_ready)
        z = flat @ A
        t, gate, gate_input = _weighed(flat, z, read, terms)
        if weight is None:
            assert bias_or_output is not None
            y = bias_or_output
            ctx.mark_dirty(y)
        else:
            bias = None if bias_or_output is None else bias_or_output.to(dtype)
            y = F.linear(x.to(dtype), weight.to(dtype), bias)
        add_product(y, t, B)
        ctx.save_for_backward(flat if terms.front else None, z, gate_input, gate, weight, V_ready, *values[:-1])
        ctx.front, ctx.shape = terms.front, x.shape
        ctx.dtypes = (x.dtype, None if x_adapter is None else x_adapter.dtype)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        flat, z, gate_input, gate, weight, V_ready, U, V, lam, v, w1, w2 = ctx.saved_tensors
        front, dtype, k = ctx.front, z.dtype, lam.shape[1]
        needs_x, _, needs_base, needs_adapter, *_ = ctx.needs_input_grad
        dY = grad.to(dtype).reshape(-1, grad.shape[-1])
        A, B = _projections(Terms(U, V, lam, v, w1, w2, front), dtype, V_ready)
        dz, dlam, dw1, dw2, da = _mix_backward(dY @ B, z, gate, gate_input, lam, None if front else w1, w2)
        if da is not None and front:
            dw1 = V.mT.to(w1.dtype) @ (flat.mT.to(w1.dtype) @ da)
        dv = None
        if v is not None:
            values = mixed_values(gate, lam)
            M = flat.mT @ dz if front else dY.mT @ (z * filled(values, z.shape[1]).to(dtype))
            dv = (M[:, :k].to(v.dtype) * (V if front else U)).sum(1, dtype=v.dtype)

        dx = dx_adapter = None
        x_dtype, adapter_dtype = ctx.dtypes
        if needs_x and weight is not None:
            dx = dY @ weight.to(dtype)
        if needs_x or needs_adapter:
            own = dz @ A.mT if needs_adapter or dx is None else dx.addmm_(dz, A.mT)
            if front and da is not None:
                own = own.addr_(da.to(dtype), (V @ w1.to(V.dtype)).to(dtype))
            if needs_adapter:
                dx_adapter = own.view(ctx.shape).to(adapter_dtype)
            elif adapter_dtype is None:
                dx = own
        dx = dx.view(ctx.shape).to(x_dtype) if needs_x and dx is not None else None
        dbase = None
        if needs_base:
            dbase = grad if weight is None else dY.sum(0)
        return dx, None, dbase, dx_adapter, None, None, None, dlam, dv, dw1, dw2, None


def _rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x [..., in] as [T, in] in `dtype`."""
    return x.to(dtype).reshape(-1, x.shape[-1])


def _weighed(
    flat: Tensor, z: Tensor, read: Tensor | None, terms: Terms, weights: Gate | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`_mix`, whose gate reads x V without v where v stands in front, or has other `weights`."""
    lam, w1, w2 = terms.lam, terms.w1, terms.w2
    if w1 is None or w2 is None or (read is None and weights is None):
        return _mix(z, w1, w2, lam)
    gate_input = flat @ read if read is not None else _gate_input(z, w1)
    gate = token_gate(gate_input, w2)
    if weights is not None:
        gate = weights(gate)
    return z * filled(mixed_values(gate, lam), z.shape[1]).to(z.dtype), gate, gate_input


def _in_plain(
    x: Tensor,
    weight: Tensor | None,
    bias_or_output: Tensor | None,
    x_adapter: Tensor | None,
    V_ready: Tensor | None,
    terms: Terms,
    keep: Keep | None,
    weights: Gate | None,
) -> Tensor:
    """What `GatedLinear` gives, not in place, in operations that torch.func transforms; with
    `weights`, under another gate than Eq. 6's.

    With `keep`, in a generation without gradients, it is the same to the bit and in place, and what
    is the same for all tokens is kept.
    """
    dtype = compute_dtype(x)
    form = partial(_readied, terms, dtype, V_ready)
    A, B, read = form() if keep is None else keep(form)
    flat = _rows(x if x_adapter is None else x_adapter, dtype)
    t, _, _ = _weighed(flat, flat @ A, read, terms, weights)
    y = base_in_plain(x, weight, bias_or_output, dtype)
    return y + (t.to(y.dtype) @ B.to(y.dtype).mT).view(y.shape) if keep is None else add_product(y, t, B)


def ready(V: Tensor, dtype: torch.dtype) -> Tensor:
    """A frozen factor [n, k] as the products take it: in `dtype`, on a GPU filled up to whole
    blocks of columns."""
    return filled(V, COLUMNS if V.is_cuda and dtype.itemsize == 2 else 1).to(dtype)


def _projections(terms: Terms, dtype: torch.dtype, V_ready: Tensor | None) -> tuple[Tensor, Tensor]:
    """A [in, k'] and B [out, k'], the frozen factors with v folded into the one it stands
    beside."""
    U, V, v = terms.U, terms.V, terms.v
    if terms.front:
        return ready(scaled_rows(V, v), dtype), ready(U, dtype)
    return ready(V, dtype) if V_ready is None else V_ready, ready(scaled_rows(U, v), dtype)


class Readied(NamedTuple):
    """What of a layer does not depend on the token: A [in, k'] and B [out, k'] as `_projections`
    gives them, and V w₁ [in], which the gate reads where v stands in front."""

    A: Tensor
    B: Tensor
    read: Tensor | None


def _readied(terms: Terms, dtype: torch.dtype, V_ready: Tensor | None) -> Readied:
    V, w1 = terms.V, terms.w1
    read = (V @ w1.to(V.dtype)).to(dtype) if terms.front and w1 is not None else None
    return Readied(*_projections(terms, dtype, V_ready), read)


def _mix(z: Tensor, w1: Tensor | None, w2: Tensor | None, lam: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Eq. 6 and the inner part of Eq. 5: t = z ∘ (g λ) [T, k'], g [T, m] and the gate's input z w₁
    [T] (None for one head)."""
    if w1 is None or w2 is None:
        return z * filled(lam, z.shape[1]).to(z.dtype), None, None
    if kernels.available(z, w1, w2, lam):
        return kernels.mix(z, w1, w2, lam)
    a = _gate_input(z, w1)
    gate = token_gate(a, w2)
    return z * filled(mixed_values(gate, lam), z.shape[1]).to(z.dtype), gate, a


def _mix_backward(
    dt: Tensor, z: Tensor, gate: Tensor | None, a: Tensor | None, lam: Tensor, w1: Tensor | None, w2: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of `_mix`: dz [T, k'], dλ, dw₁, dw₂ and da [T]; without w1 the gate's input came
    from elsewhere."""
    k = lam.shape[1]
    if gate is None or a is None or w2 is None:
        return dt * filled(lam, z.shape[1]).to(z.dtype), (dt * z)[:, :k].sum(0, dtype=lam.dtype)[None], None, None, None
    if w1 is not None and kernels.available(dt, z, gate, a, lam, w1, w2):
        return (*kernels.mix_backward(dt, z, gate, a, lam, w1, w2), None)
    dvalues = (dt * z)[:, :k].to(lam.dtype)
    dgate = dvalues @ lam.mT
    dlogits = gate * (dgate - (gate * dgate).sum(1, keepdim=True))
    da = dlogits @ w2
    dz = dt * filled(mixed_values(gate, lam), z.shape[1]).to(z.dtype)
    dw1 = None
    if w1 is not None:
        dw1 = da @ z[:, :k].to(da.dtype)
        dz = dz.addr_(da.to(z.dtype), filled(w1[None], z.shape[1])[0].to(z.dtype))
    return dz, gate.mT @ dvalues, dw1, a.to(w2.dtype) @ dlogits, da


def _gate_input(z: Tensor, w1: Tensor) -> Tensor:
    """a = x V w₁ [T], from x V [T, k']."""
    return z @ filled(w1[None], z.shape[1])[0].to(z.dtype)


def token_gate(a: Tensor, w2: Tensor) -> Tensor:
    """Eq. 6: g [T, m], the weight of every head for every token, from a = x V w₁ [T]."""
    return torch.softmax(torch.outer(a.to(w2.dtype), w2), 1)


def scaled_rows(factor: Tensor, v: Tensor | None) -> Tensor:
    """diag(v) · factor, or the factor itself where there is no v."""
    return factor if v is None else factor * v[:, None]


def mixed_values(gate: Tensor | None, lam: Tensor) -> Tensor:
    """Σ_i g_i λ_i: [T, k] for a gate [T, m], [1, k] for the one head that has none."""
    return lam if gate is None else gate @ lam


def mosara_linear(
    x: Tensor,
    weight: Tensor | None,
    bias_or_output: Tensor | None,
    terms: Terms,
    x_adapter: Tensor | None = None,
    V_ready: Tensor | None = None,
    keep: Keep | None = None,
    weights: Gate | None = None,
) -> Tensor:
    """Eq. 5 and 6: x [..., in] → [..., out]. For a base layer whose weight must not be read, None
    and that layer's output: Eq. 5's second term is added to it, in place under Eq. 6's gate.

    `V_ready`, where the caller keeps it, is `ready(V, dtype)`; it saves forming it at every step.
    `keep` (`svdtune.methods.compute.together`) saves forming at every token of a generation what is
    the same for all. `weights`, if given, makes another gate of Eq. 6's.
    """
    if keep is None and weights is None and not under_transform():
        return GatedLinear.apply(x, weight, bias_or_output, x_adapter, V_ready, *terms)
    return _in_plain(x, weight, bias_or_output, x_adapter, V_ready, terms, keep, weights)


def add_mosara_by_sample(
    y: Tensor, x: Tensor, terms: Terms, V_ready: Tensor | None = None, weights: Gate | None = None
) -> Tensor:
    """Eq. 5's second term with another adapter for each of N samples, added to y [N, ..., out] in
    place; `weights` as for `mosara_linear`.

    x [N, ..., in], λ [N, m, k], v [N, out] (or [N, in] in front), w₁ [N, k], w₂ [N, m]; U and V are
    the same for all, so that both products with them are of the whole batch.
    """
    U, V, lam, v, w1, w2, front = terms
    dtype, k = compute_dtype(x), lam.shape[2]
    x = x.to(dtype).reshape(len(x), -1, x.shape[-1])
    before = x if v is None or not front else x * v[:, None].to(dtype)
    z = before @ (ready(V, dtype) if V_ready is None else V_ready)
    values = lam
    if w1 is not None and w2 is not None:
        reads, through = (x, w1.to(V.dtype) @ V.mT) if front else (z[..., :k], w1)
        a = torch.bmm(reads, through[..., None].to(dtype)).to(w2.dtype)
        gate = torch.softmax(a * w2[:, None], -1)
        if weights is not None:
            gate = weights(gate.flatten(0, 1)).view(gate.shape)
        values = gate @ lam
    added = (z * filled(values, z.shape[-1]).to(dtype)) @ ready(U, dtype).mT
    flat = y.view(len(y), -1, y.shape[-1])
    added = added.to(y.dtype)
    if v is None or front:
        flat.add_(added)
    else:
        flat.addcmul_(added, v[:, None].to(y.dtype))
    return y


def mosara_pair(U: Tensor, V: Tensor, lam: Tensor, v: Tensor | None, front: bool = False) -> tuple[Tensor, Tensor]:
    """Eq. 5 for one head, λ [1, k]: A [in, k] and B [out, k] with ΔW = B Aᵀ.

    Several heads have no such pair: their weights depend on the token.
    """
    if front:
        return scaled_rows(V, v), U * lam
    return V, scaled_rows(U, v) * lam


def random_start(k: int, num_heads: int, router: bool = True) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """λ [m, k], w₁ [k] and w₂ [m] as the paper starts them: Kaiming uniform with a = √5, so
    ±1/√fan_in, in fp32.

    The fan-in of λ (1×k each) and of w₁ is k, that of w₂ is 1. One head has no router.
    """
    bound = 1 / math.sqrt(k)
    lam = torch.empty(num_heads, k).uniform_(-bound, bound)
    if num_heads == 1 or not router:
        return lam, None, None
    return lam, torch.empty(k).uniform_(-bound, bound), torch.empty(num_heads).uniform_(-1, 1)
