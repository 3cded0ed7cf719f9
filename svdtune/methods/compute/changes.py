"""The weight changes of many small layers at once: for layers whose launches cost more than their
arithmetic.

    ΔW = P Vᵀ − P₀ V₀ᵀ = B Aᵀ        P = U diag(s), A = [V, V − V₀], B = [P − P₀, P₀];
                                    A = V, B = P where nothing is taken away

is formed for all layers of a shape in a dozen kernels, and each of them then computes x Wᵀ + x ΔWᵀ
with plain matrix products. That is the literal Eq. 3 of SORSA: two and a half times the floor's
arithmetic, and on a model of 576 columns, whose GPU waits for its launches, cheaper than eight
small products a layer. The way back turns all dΔW together into dU, ds and dV.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from svdtune.methods.compute.lowrank import Product, pair, scaled


class Change(NamedTuple):
    """ΔWᵀ [in, out] of `tensors` = (U, s, V, P₀, V₀)."""

    tensors: Product
    delta: Tensor


def changes_at_once(jobs: list[tuple[Product, torch.dtype]]) -> list[Change | None]:
    """A `Change` for each job, whose second entry is its dtype. None if tensors are sharded or not
    there.

    The sum inside ΔW is formed in fp32 from factors rounded to that dtype, as the layers' own nodes
    form it.
    """
    groups: dict[tuple[Any, ...], list[int]] = {}
    for i, (tensors, dtype) in enumerate(jobs):
        if all(tensor is None or _is_whole(tensor) for tensor in tensors):
            kind = tuple(tensor if tensor is None else (tensor.shape, tensor.dtype) for tensor in tensors)
            groups.setdefault((kind, tensors[0].device, dtype), []).append(i)
    results: list[Change | None] = [None] * len(jobs)
    for (_, _, dtype), members in groups.items():
        columns = zip(*(jobs[i][0] for i in members), strict=True)
        deltas = _ChangesAtOnce.apply(dtype, len(members), *[tensor for column in columns for tensor in column])
        for i, delta in zip(members, deltas, strict=True):
            results[i] = Change(jobs[i][0], delta)
    return results


def _is_whole(tensor: Tensor) -> bool:
    """Whether a parameter is an ordinary one with its values in memory. FSDP and ZeRO shard theirs
    between the layers' turns."""
    return type(tensor) is nn.Parameter and not hasattr(tensor, "ds_id") and not tensor.is_meta


class _ChangesAtOnce(torch.autograd.Function):
    """For n layers of one shape: n U's, s's, V's, P₀'s and V₀'s → n ΔWᵀ's."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, count: int, *flat: Any) -> tuple[Tensor, ...]:
        Us, ss, Vs, P0s, V0s = (flat[i * count : (i + 1) * count] for i in range(5))
        U, V = torch.stack(Us), torch.stack(Vs)
        s = None if ss[0] is None else torch.stack(ss)[:, None]
        P0, V0 = (None, None) if P0s[0] is None else (torch.stack(P0s), torch.stack(V0s))
        A, B = pair(Product(U, s, V, P0, V0), dtype)
        ctx.save_for_backward(A[..., : U.shape[-1]], scaled(U, s).to(dtype), None if s is None else U, s)
        ctx.set_materialize_grads(False)
        ctx.count, ctx.dtypes = count, (U.dtype, V.dtype)
        return torch.bmm(A, B.mT).unbind(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> Any:
        count = ctx.count
        V, P, U, s = ctx.saved_tensors
        U_dtype, V_dtype = ctx.dtypes
        dUs: list[Tensor | None] = [None] * count
        dss: list[Tensor | None] = [None] * count
        dVs: list[Tensor | None] = [None] * count
        used = [n for n, gradient in enumerate(gradients) if gradient is not None]
        if used:  # a layer that was not called gets no gradient, not one of zeros
            rows = slice(None) if len(used) == count else used
            G = torch.stack([gradients[n] for n in used])
            dP = batched_product(G.mT, V[rows], U_dtype)
            _put(dVs, used, batched_product(G, P[rows], V_dtype))
            _put(dUs, used, dP if s is None else dP * s[rows])
            if s is not None:
                _put(dss, used, (dP * U[rows]).sum(1))
        return None, None, *dUs, *dss, *dVs, *[None] * (2 * count)


def batched_product(X: Tensor, Y: Tensor, dtype: torch.dtype) -> Tensor:
    """X Y in `dtype`, of sums that are not rounded in between."""
    if X.is_cuda and X.dtype.itemsize == 2 and dtype == torch.float32:
        return torch.bmm(X, Y, out_dtype=dtype)
    wide = torch.promote_types(X.dtype, dtype)
    return (X.to(wide) @ Y.to(wide)).to(dtype)


def _put(places: list[Tensor | None], indices: list[int], stacked: Tensor) -> None:
    for n, one in zip(indices, stacked.unbind(0), strict=True):
        places[n] = one
