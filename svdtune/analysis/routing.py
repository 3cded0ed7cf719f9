"""How Mo-SARA's router mixes its heads, by layer and task (SARA, Fig. 7 and Appendix D)."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from svdtune.analysis.weights import Opened
from svdtune.errors import SvdtuneError
from svdtune.methods.layers.matrices import acting
from svdtune.methods.mosara.layer import MoSaraLinear


class Routing(NamedTuple):
    """The gate of one layer over the tokens of a task.

    Attributes:
        gate: the mean weight of each head [m], the sum is 1; what the paper's heat maps show.
        entropy: the mean entropy of a token's gate over ln m: 1 for an even mix, 0 where one head
            has it all.
        dominant: the head with the largest mean weight, from 0.
        share: the share of tokens for which that head has the largest weight.
    """

    gate: list[float]
    entropy: float
    dominant: int
    share: float


def gate_of(x: Tensor, V: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """Eq. 6, softmax((x V) w₁ w₂): [T, m] for the tokens x [T, in] of one layer, float32 or better.

    Of a top-1 gate these are the weights by which it picks.
    """
    exact = torch.promote_types(x.dtype, torch.float32)
    read = (x.to(exact) @ V.to(exact)) @ w1.to(exact)
    return torch.softmax(torch.outer(read, w2.to(exact)), 1)


def described(gates: Tensor) -> Routing:
    """What `Routing` says of the gates [T, m] of T tokens."""
    mean = gates.double().mean(0)
    dominant = int(mean.argmax())
    entropy = float(torch.special.entr(gates.double()).sum(1).mean()) / math.log(gates.shape[1])
    return Routing(mean.tolist(), entropy, dominant, float((gates.argmax(1) == dominant).double().mean()))


@torch.inference_mode()
def routing(run: Opened, tasks: Mapping[str, Sequence[Sequence[int]]]) -> dict[str, Any]:
    """Put items through the model once, item by item, and average the gates of every layer over
    their tokens.

    Args:
        run: of Mo-SARA with at least two heads and a gate.
        tasks: token ids of some prompts, by task.

    Returns:
        {"heads": m, "tasks": {task: {"items", "tokens", "layers": {name: `Routing` as a dict}}}}.

    Raises:
        SvdtuneError: there is no router, or a task has no items.
    """
    routed = {layer.name: layer.module for layer in run.layers if _has_router(layer.module)}
    if not routed:
        raise SvdtuneError(f"{run.source.run} has no router: only Mo-SARA with at least two heads and a gate has one")
    found: dict[str, dict[str, Any]] = {}
    for task, items in tasks.items():
        if not items:
            raise SvdtuneError(f"the task {task} has no items to put through the model")
        gates = _gates(run, routed, items)
        tokens = len(next(iter(gates.values())))
        layers = {name: described(values)._asdict() for name, values in gates.items()}
        found[task] = {"items": len(items), "tokens": tokens, "layers": layers}
    return {"heads": len(next(iter(found[task]["layers"].values()))["gate"]), "tasks": found}


def _has_router(module: torch.nn.Module) -> TypeGuard[MoSaraLinear]:
    return isinstance(module, MoSaraLinear) and module.configs[acting(module)[0]].has_router


def _gates(run: Opened, routed: Mapping[str, MoSaraLinear], items: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """The gates [T, m] of each layer for all tokens of some items, computed from what the layer is
    given."""
    seen: dict[str, list[Tensor]] = {name: [] for name in routed}

    def watch(name: str, layer: MoSaraLinear) -> RemovableHandle:
        adapter = acting(layer)[0]
        tensors = layer.adapter_tensors(adapter)
        V, w1, w2 = (tensors[part] for part in ("frozen_V", "mosara_w1", "mosara_w2"))

        def keep(_: torch.nn.Module, args: tuple[Any, ...]) -> None:
            seen[name].append(gate_of(args[0].flatten(0, -2), V, w1, w2).cpu())

        return layer.register_forward_pre_hook(keep)

    handles = [watch(name, layer) for name, layer in routed.items()]
    try:
        for item in items:
            run.loaded.model(input_ids=torch.tensor([list(item)], device=run.loaded.model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}
