"""The stacked factors of many layers at once: a few kernels for each shape instead of a few in each layer.

    P = U diag(s),  A = [V, V − V₀],  B = [P − P₀, P₀]        (A = V and B = P where nothing is taken away)

as `svdtune.methods.lowrank.stacked` forms them one layer at a time, bit for bit.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from svdtune.methods.lowrank import alignment

Tensors = tuple[Tensor | None, ...]


class Stacked(NamedTuple):
    """What was formed of `tensors` = (U, s, V, P₀, V₀): P [out, r] with a gradient to U and s, A [in, w] and B [out, w]."""

    tensors: Tensors
    P: Tensor
    A: Tensor
    B: Tensor


def stacked_at_once(jobs: list[tuple[Tensors, torch.dtype]]) -> list[Stacked | None]:
    """A `Stacked` for each job, whose second entry is the dtype of A and B; None where the tensors are sharded or elsewhere."""
    groups: dict[tuple, list[int]] = {}
    for i, (tensors, dtype) in enumerate(jobs):
        if all(tensor is None or _is_whole(tensor) for tensor in tensors):
            kind = tuple(tensor if tensor is None else (tensor.shape, tensor.dtype) for tensor in tensors)
            groups.setdefault((kind, tensors[0].device, dtype), []).append(i)
    results: list[Stacked | None] = [None] * len(jobs)
    for (_, device, dtype), members in groups.items():
        count = len(members)
        columns = zip(*(jobs[i][0] for i in members), strict=True)
        flat = [tensor for column in columns for tensor in column]
        formed = _StackedAtOnce.apply(dtype, alignment(dtype, device), count, *flat)
        for n, i in enumerate(members):
            results[i] = Stacked(jobs[i][0], formed[n], formed[count + n], formed[2 * count + n])
    return results


def _is_whole(tensor: Tensor) -> bool:
    """Whether a parameter is an ordinary one, with its values in memory: FSDP and ZeRO shard theirs between layers' turns."""
    return type(tensor) is nn.Parameter and not hasattr(tensor, "ds_id") and not tensor.is_meta


class _StackedAtOnce(torch.autograd.Function):
    """For n layers of one shape: n U's, s's, V's, P₀'s and V₀'s → n P's, A's and B's. Only P has a gradient, to U and s.

    The layers' own nodes give V its gradient, and P theirs.
    """

    @staticmethod
    def forward(ctx, dtype, pad, count, *flat):
        Us, ss, Vs, P0s, V0s = (flat[i * count : (i + 1) * count] for i in range(5))
        U, V = torch.stack(Us), torch.stack(Vs)
        s = None if ss[0] is None else torch.stack(ss)[:, None]
        P = U if s is None else U * s
        r = U.shape[-1]
        width = r if P0s[0] is None else 2 * r
        width += -width % pad
        A, B = (X.new_empty(*X.shape[:-1], width, dtype=dtype) for X in (V, U))
        if P0s[0] is None:
            A[..., :r], B[..., :r] = V, P
        else:
            P0 = torch.stack(P0s)
            A[..., :r], B[..., r : 2 * r] = V, P0
            A[..., r : 2 * r], B[..., :r] = V - torch.stack(V0s), P - P0
        used = r if P0s[0] is None else 2 * r
        if used < width:
            A[..., used:], B[..., used:] = 0, 0
        ctx.save_for_backward(U if ctx.needs_input_grad[3 + count] else None, s)
        ctx.set_materialize_grads(False)
        ctx.count = count
        As, Bs = A.unbind(0), B.unbind(0)
        ctx.mark_non_differentiable(*As, *Bs)
        return *P.unbind(0), *As, *Bs

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients):
        count = ctx.count
        U, s = ctx.saved_tensors
        dPs = gradients[:count]
        given = [n for n, dP in enumerate(dPs) if dP is not None]  # a layer that was not called has none, and gets none
        dUs, dss = [None] * count, [None] * count
        if given:
            dP, rows = torch.stack([dPs[n] for n in given]), slice(None) if len(given) == count else given
            found = (dP if s is None else dP * s[rows]).unbind(0)
            for n, dU in zip(given, found, strict=True):
                dUs[n] = dU
            if U is not None:
                for n, ds in zip(given, (dP * U[rows]).sum(1).unbind(0), strict=True):
                    dss[n] = ds
        return None, None, None, *dUs, *dss, *[None] * (3 * count)
