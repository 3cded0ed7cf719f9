"""Work that the layers of one model share during a forward pass, where sharing is cheaper.

Layers that read one tensor (q, k and v; gate and up) become one autograd node: one skinny product
with x, and one sum of input gradients. When a small model trains, its GPU waits for launches, so
all weight changes are formed at once instead (`svdtune.methods.compute.changes`). While a text is
generated, each layer forms only for the first token what does not depend on tokens, such as its
pair. Passes that extend one key-value cache have one set of parameters, or the cache itself would
be out of date.

The model's code is not read for this. One pass is recorded, and in the next, layers that shared an
input share a product. A result that was computed ahead is used only if layer, tensors and input are
the same objects, and it is dropped when the pass ends. So no step of an optimizer can lie between.
(Fused optimizers move no version counter that would tell.) Otherwise a layer computes for itself:

- outside a pass of the whole model: one of its blocks is called, or recomputed under gradient
  checkpointing,
- while hooks pack saved tensors (checkpointing, offloading): a recomputation must save the same
  ones,
- under `torch.compile`, which fuses by itself, and on CPUs, where a resumed run repeats every
  bit.
"""

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import is_
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache, EncoderDecoderCache

from svdtune.methods.compute.changes import Change, changes_at_once
from svdtune.methods.compute.lowrank import (
    LowRankLinear,
    Part,
    Product,
    alignment,
    cast,
    compute_dtype,
    linear_with_pair,
    stacked,
)
from svdtune.methods.compute.transforms import under_transform

if TYPE_CHECKING:  # which imports this module
    from svdtune.methods.layers.lowrank import LowRankLayer

Keep = Callable[[Callable[[], Any]], Any]

SMALL_MODEL, SMALL_LAYER = 2**28, 4e9
"""Elements of the adapted weights, and multiplications of a layer (rows · in · out), up to which
launches outweigh arithmetic: 4e9 take an H100 some 15 µs, a launch from Python as long, and a
layer's own node makes six more of them."""


class Turn(NamedTuple):
    """What one layer did in a pass: for which adapter, with which tensors (U, s, V, P₀, V₀), in
    which dtype. `input` numbers the inputs of a pass: layers with one number read one tensor.
    `rows` is how long it was, once."""

    layer: "LowRankLayer[Any]"
    adapter: str
    tensors: Product
    dtype: torch.dtype
    input: int
    rows: int


class Ahead(NamedTuple):
    """An output that was computed before its layer was called, and what it was computed from."""

    x: Tensor
    p: float
    tensors: Product
    y: Tensor


class Kept(NamedTuple):
    """What was formed of an adapter's `tensors` for products in `dtype`."""

    tensors: Sequence[Tensor | None]
    dtype: torch.dtype
    formed: Any


KeptByAdapter = dict[tuple[nn.Module, str], Kept]


@dataclass
class Pass:
    """One forward pass: what was computed ahead, how far it follows the pass before, and the latest
    input, also as [rows, in]."""

    changes: dict[nn.Module, Change]
    kept: KeptByAdapter | None = None
    turns: list[Turn] = field(default_factory=list)
    as_planned: bool = True
    ahead: dict[nn.Module, Ahead] = field(default_factory=dict)
    x: Tensor | None = None
    flat: Tensor | None = None


class Together:
    """Watches the passes of one model and does ahead what its layers can share.

    Attributes:
        enabled: True or False; None for on with CUDA tensors alone.
        trained_before: the parameters that were trained before the last adapter was put on.
    """

    def __init__(self) -> None:
        self.enabled: bool | None = None
        self.trained_before: list[nn.Parameter] = []
        self._plan: list[Turn] = []
        self._followers: dict[nn.Module, list[Turn]] = {}
        self._apart: set[nn.Module] = set()
        self._small = False
        self._pass: Pass | None = None
        self._kept: KeptByAdapter = {}
        self._cache: weakref.ref[DynamicCache] | None = None

    def __reduce__(self) -> tuple[type["Together"], tuple[()]]:
        """A copy of a model is watched anew."""
        return Together, ()

    def watch(self, model: nn.Module) -> None:
        """Begin a pass whenever `model` is called."""
        if not self._hooks_on(model):
            model.register_forward_pre_hook(self._begin, with_kwargs=True)
            model.register_forward_hook(self._end, always_call=True)

    def leave(self, model: nn.Module) -> None:
        """Take the hooks off the model."""
        for hooks, key in self._hooks_on(model):
            del hooks[key]
        self._pass = None
        self._kept.clear()
        self._follow([])

    def _hooks_on(self, model: nn.Module) -> list[tuple[dict[int, Any], int]]:
        """svdtune's hooks on the model. They are looked up there: a copy of a model has the hooks,
        but no handles to them."""
        every = (model._forward_pre_hooks, model._forward_hooks)
        return [
            (hooks, key) for hooks in every for key, hook in hooks.items() if getattr(hook, "__self__", None) is self
        ]

    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self._pass = None
        if self.enabled is False or torch.compiler.is_compiling() or under_transform():
            return
        if not torch.is_grad_enabled():
            self._pass = Pass({}, self._kept_for(growing_cache((*args, *kwargs.values()))))
            return
        self._kept.clear()
        if self.enabled or torch.cuda.is_available():
            turns = self._plan if self._small else []
            changes = changes_at_once([(turn.tensors, turn.dtype) for turn in turns])
            found = zip(turns, changes, strict=True)
            self._pass = Pass({turn.layer: change for turn, change in found if change is not None})

    def _kept_for(self, cache: DynamicCache | None) -> KeptByAdapter | None:
        """What was formed for the first tokens in a key-value cache; None if there is no such
        cache."""
        if cache is None:
            return None
        if self._cache is None or self._cache() is not cache or is_empty(cache):
            self._kept.clear()
            kept = self._kept  # and not self, which the callback would keep alive
            self._cache = weakref.ref(cache, lambda _: kept.clear())
        return self._kept

    def _end(self, model: nn.Module, *_: Any) -> None:
        now, self._pass = self._pass, None
        if now is None:
            return
        # never called with that input, so they do not belong to their group
        self._apart.update(now.ahead)
        if now.ahead or not now.as_planned or len(now.turns) != len(self._plan):
            repeated = len({turn.layer for turn in now.turns}) < len(now.turns)
            self._follow([] if repeated else now.turns)
            # FSDP gathers the tensors of a block when the block is called: not yet, at the
            # beginning of a pass.
            self._small = self._small and not any(hasattr(m, "set_reshard_after_forward") for m in model.modules())

    def _follow(self, turns: list[Turn]) -> None:
        """Make the turns of a pass the plan of the next."""
        self._plan = turns
        sizes = [turn.layer.in_features * turn.layer.out_features for turn in turns]
        work = sum(turn.rows * size for turn, size in zip(turns, sizes, strict=True))
        self._small = sum(sizes) <= SMALL_MODEL and work <= SMALL_LAYER * len(turns)
        by_input: dict[int, list[Turn]] = {}
        for turn in turns:
            if turn.layer not in self._apart:
                by_input.setdefault(turn.input, []).append(turn)
        self._followers = {group[0].layer: group[1:] for group in by_input.values() if len(group) > 1}

    def linear(
        self, layer: "LowRankLayer[Any]", adapter: str, x: Tensor, part: Part, x_adapter: Tensor | None, p: float
    ) -> Tensor:
        """`low_rank_linear` for one layer and adapter. If the layer's weight may be read, it uses
        what was computed ahead, or computes several layers at once."""
        tensors, now = part.product, self._pass
        pair = self._kept_pair(layer, adapter, x, tensors) if x_adapter is None and p == 0 else None
        if pair is not None:
            return linear_with_pair(x, part, *pair)
        flat: list[Tensor | None] = [part.weight, part.bias_or_output, *tensors]
        if now is None or part.weight is None or not (x.is_cuda or self.enabled) or _packs_saved_tensors():
            return LowRankLinear.apply(x, x_adapter, p, *flat)
        dtype = compute_dtype(x)
        self._note(now, layer, adapter, x, tensors, dtype)
        ahead = now.ahead.pop(layer, None)
        if ahead is not None:
            if ahead.x is x and ahead.p == p and x_adapter is None and _same(ahead.tensors, tensors):
                return ahead.y
            self._apart.add(layer)
        change = now.changes.get(layer) if x_adapter is None and p == 0 else None
        if change is not None and change.delta.dtype == dtype and _same(change.tensors, tensors):
            return self._plain(now, x, part, change.delta)
        followers = self._followers.get(layer) if torch.is_grad_enabled() and x_adapter is None else None
        ready = [turn for turn in followers or () if turn.layer not in self._apart and _would_repeat(turn, p)]
        if not ready:
            return LowRankLinear.apply(x, x_adapter, p, *flat)
        for turn in ready:
            flat += (*turn.layer.readable(), *turn.tensors)
        y, *others = LowRankLinear.apply(x, None, p, *flat)
        for turn, other in zip(ready, others, strict=True):
            now.ahead[turn.layer] = Ahead(x, p, turn.tensors, other)
        return y

    def _kept_pair(self, layer: nn.Module, adapter: str, x: Tensor, tensors: Product) -> tuple[Tensor, Tensor] | None:
        dtype = compute_dtype(x)
        keep = self.keeper(layer, adapter, tensors, dtype)
        return None if keep is None else keep(lambda: stacked(tensors, dtype, alignment(dtype, x.device)))

    def keeper(
        self, layer: nn.Module, adapter: str, tensors: Sequence[Tensor | None], dtype: torch.dtype
    ) -> Keep | None:
        """What gives a function's answer, asked for in the first pass of a generation alone; None
        outside one. The answer follows from an adapter's tensors."""
        kept = None if self._pass is None else self._pass.kept
        if kept is None or torch.is_grad_enabled() or under_transform():
            return None

        def keep(form: Callable[[], Any]) -> Any:
            found = kept.get((layer, adapter))
            if found is None or found.dtype != dtype or not _same(found.tensors, tensors):
                kept[layer, adapter] = found = Kept(tensors, dtype, form())
            return found.formed

        return keep

    def _plain(self, now: Pass, x: Tensor, part: Part, delta: Tensor) -> Tensor:
        """x Wᵀ + b + x ΔWᵀ with PyTorch's own nodes, which launch faster than one written in
        Python."""
        if now.flat is None:
            now.flat = cast(x, delta.dtype).reshape(-1, x.shape[-1])
        assert part.weight is not None
        y = F.linear(now.flat, cast(part.weight, delta.dtype), part.bias_or_output)
        return y.addmm_(now.flat, delta).view(*x.shape[:-1], -1)

    def _note(
        self, now: Pass, layer: "LowRankLayer[Any]", adapter: str, x: Tensor, tensors: Product, dtype: torch.dtype
    ) -> None:
        """Add a layer's turn to the pass: the planned one, if it is the same."""
        turns = now.turns
        number = 0 if not turns else turns[-1].input + (now.x is not x)
        if now.x is not x:
            now.x, now.flat = x, None
        planned = self._plan[len(turns)] if len(turns) < len(self._plan) else None
        if (
            planned is not None
            and planned.layer is layer
            and planned.adapter == adapter
            and planned.dtype is dtype
            and planned.input == number
            and _same(planned.tensors, tensors)
        ):
            turns.append(planned)
        else:
            now.as_planned = False
            turns.append(Turn(layer, adapter, tensors, dtype, number, x.numel() // x.shape[-1]))


def _would_repeat(turn: Turn, p: float) -> bool:
    """Whether a layer would now do what it was seen to do."""
    layer = turn.layer
    return (
        layer.sole_adapter() == turn.adapter
        and layer.dropout_p(turn.adapter) == p
        and _same(layer.product(turn.adapter), turn.tensors)
    )


def _same(some: Sequence[Tensor | None], others: Sequence[Tensor | None]) -> bool:
    """Whether two sequences hold the same objects."""
    return all(map(is_, some, others))


def _packs_saved_tensors() -> bool:
    """Whether hooks on saved tensors are active."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def growing_cache(arguments: Iterable[Any]) -> DynamicCache | None:
    """The key-value cache among a forward's arguments that grows by the tokens of each pass; None
    if there is none. It is found by its type: its name depends on the release of transformers.

    Of an encoder-decoder model it is the cache of the decoder's self-attention. A static cache is
    left out: it keeps its length on the device, and asking for it would wait for the device.
    """
    for argument in arguments:
        cache = argument.self_attention_cache if isinstance(argument, EncoderDecoderCache) else argument
        if isinstance(cache, DynamicCache):
            return cache
    return None


def is_empty(cache: DynamicCache) -> bool:
    """Whether a cache holds nothing yet, or nothing any more after a reset."""
    try:
        return cache.get_seq_length() == 0
    except ValueError:  # recurrent states alone (Mamba), which have no length
        return not cache.has_previous_state()
