"""FactorBank: the stacked factors of all layers at once, for models so small that launching kernels is what takes the time.

A training step of a 135M model spends more time starting kernels than running them. Forming each layer's pair A, B (see
`lowrank.py`) by itself, and its factors' gradients again, is some twenty launches a layer. The bank is one autograd node for
all layers: factors of one shape are stacked and treated together, forward and backward, so each layer is left with three
matrix products that autograd's own C++ nodes differentiate.

The node keeps no saved tensors, so its pairs may be used in any number of forwards and backwards (gradient accumulation,
checkpointing, several losses) until a factor changes; changing one between forward and backward is an error, as elsewhere.
Without gradients the pairs are kept too: a generated token then costs no more than LoRA's two products.
"""

from collections import defaultdict
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from svdtune.methods.lowrank import alignment, scaled, stacked

if TYPE_CHECKING:
    from svdtune.methods.layer import SvdLayer

# Elements of all pairs together up to which a bank is used in training: 128 MiB in bf16. Larger models are not launch bound.
TRAINING_ELEMENTS = 1 << 26

Pieces = tuple[Tensor, Tensor | None, Tensor, Tensor | None, Tensor | None]  # U, s, V, P₀, V₀ as in `lowrank.py`
Pair = tuple[Tensor, Tensor]


class FactorBank:
    """The pairs of one adapter's layers."""

    def __init__(self, layers: "list[SvdLayer]", adapter: str):
        self.layers, self.adapter = layers, adapter
        self._forget()

    def _forget(self) -> None:
        self._key: tuple | None = None
        self._versions: dict[int, tuple] = {}
        self._pairs: dict[int, Pair] = {}

    def __getstate__(self) -> dict:
        """Copies and pickles start without pairs: those belong to a graph."""
        return {"layers": self.layers, "adapter": self.adapter}

    def __setstate__(self, state: dict) -> None:
        self.__dict__ |= state
        self._forget()

    def pair(self, layer: "SvdLayer", dtype: torch.dtype) -> Pair | None:
        """A [in, w] and B [out, w] of a layer in `dtype`, or None where the layer had better form them itself."""
        if torch.compiler.is_compiling():
            return None  # the compiler fuses each layer's own
        training = torch.is_grad_enabled()
        key = (training, dtype)
        pieces = layer.pieces(self.adapter)
        if pieces is None:
            return None
        if self._key == key and self._versions.get(id(layer)) == versions_of(pieces):
            return self._pairs.get(id(layer))
        return self._refresh(layer, key)

    def _refresh(self, layer: "SvdLayer", key: tuple[bool, torch.dtype]) -> Pair | None:
        self._forget()  # first, so that two sets of pairs are never in memory
        self._key = (training, dtype) = key
        pieces = {id(member): member.pieces(self.adapter) for member in self.layers if self.adapter in member.r}
        pieces = {identity: own for identity, own in pieces.items() if own is not None and may_bank(own)}
        self._versions = {identity: versions_of(own) for identity, own in pieces.items()}
        device = layer.get_base_layer().weight.device
        members = {i: own for i, own in pieces.items() if own[0].device == device}
        size = sum((own[0].numel() + own[2].numel()) * (1 if own[3] is None else 2) for own in members.values())
        if training and size > TRAINING_ELEMENTS:
            return None
        self._pairs = stack_all(members, dtype)
        return self._pairs.get(id(layer))


def versions_of(pieces: Pieces) -> tuple:
    """What changes when a trained factor is written to, replaced, or frozen. (Frozen ones change with them, by loading.)"""
    U, s, V, _, _ = pieces
    middle = None if s is None else (id(s), s._version, s.requires_grad)
    return id(U), U._version, U.requires_grad, middle, id(V), V._version, V.requires_grad


def stack_all(members: dict[int, Pieces], dtype: torch.dtype) -> dict[int, Pair]:
    """The pairs of many layers, by the keys of `members`, as the outputs of one autograd node."""
    identities, pieces = list(members), list(members.values())
    trained = [t for U, s, V, _, _ in pieces for t in (U, s, V) if t is not None]
    outputs = StackAll.apply(pieces, dtype, *trained)
    return {identity: (outputs[2 * i], outputs[2 * i + 1]) for i, identity in enumerate(identities)}


def grouped(pieces: list[Pieces]) -> dict[tuple, list[int]]:
    """Indices of layers whose factors have the same shapes and parts."""
    groups: dict[tuple, list[int]] = defaultdict(list)
    for i, (U, s, V, P0, _) in enumerate(pieces):
        groups[U.shape, V.shape, U.dtype, V.dtype, s is None, P0 is None].append(i)
    return groups


class StackAll(torch.autograd.Function):
    """`lowrank.stacked` for every layer, layers of equal shapes together. Inputs: each layer's U, s, V, for autograd."""

    @staticmethod
    def forward(ctx, pieces, dtype, *trained):
        ctx.set_materialize_grads(False)
        ctx.pieces, ctx.versions = pieces, [versions_of(own) for own in pieces]
        outputs: list = [None] * (2 * len(pieces))
        for group in grouped(pieces).values():
            tensors = [_stack([pieces[i][part] for i in group]) for part in range(5)]
            if tensors[1] is not None:
                tensors[1] = tensors[1][:, None, :]
            A, B = stacked(*tensors, dtype, alignment(dtype, trained[0].device))
            for i, a, b in zip(group, A.unbind(0), B.unbind(0), strict=True):
                outputs[2 * i], outputs[2 * i + 1] = a, b
        return tuple(outputs)

    @staticmethod
    def backward(ctx, *gradients):
        if ctx.versions != [versions_of(own) for own in ctx.pieces]:
            raise RuntimeError("an adapter's factors were changed between the forward pass and its backward pass")
        found: dict[int, Tensor] = {}
        live = [own for own in range(len(ctx.pieces)) if gradients[2 * own] is not None]
        for group in grouped([ctx.pieces[i] for i in live]).values():
            group = [live[j] for j in group]
            for i, parts in zip(group, _group_gradients(ctx.pieces, gradients, group), strict=True):
                found |= {id(t): g for t, g in zip(ctx.pieces[i][:3], parts, strict=True) if t is not None}
        inputs = [t for own in ctx.pieces for t in own[:3] if t is not None]
        return None, None, *(found.get(id(t)) if t.requires_grad else None for t in inputs)


def _group_gradients(pieces: list[Pieces], gradients: tuple, group: list[int]) -> list[tuple]:
    """(dU, ds, dV) of each layer of a group from the gradients of its A and B."""
    U, s, V, P0, _ = pieces[group[0]]
    r = V.shape[1]
    dA = torch.stack([gradients[2 * i] for i in group])
    dB = torch.stack([gradients[2 * i + 1] for i in group])
    dV = dA[..., :r].to(V.dtype)
    if P0 is not None:
        dV += dA[..., r : 2 * r]
    dP = dB[..., :r].to(U.dtype)
    if s is None:
        return [(u, None, v) for u, v in zip(dP.unbind(0), dV.unbind(0), strict=True)]
    Us, ss = (torch.stack([pieces[i][part].detach() for i in group]) for part in (0, 1))
    ds = (dP * Us).sum(1).to(s.dtype)
    return list(zip(scaled(dP, ss[:, None, :]).unbind(0), ds.unbind(0), dV.unbind(0), strict=True))


def _stack(tensors: list[Tensor | None]) -> Tensor | None:
    return None if tensors[0] is None else torch.stack([t.detach() for t in tensors])


def may_bank(pieces: Pieces) -> bool:
    """Whether factors are plain parameters; sharded ones (FSDP, tensor parallelism) are left to their layers."""
    return all(t is None or (type(t) is nn.Parameter and not t.is_meta) for t in pieces)
