"""Experts whose weights are one tensor [experts, out, in] instead of a layer each, which no module
name reaches: `target_parameters` names them."""

import warnings
from collections.abc import Collection

from torch import nn

from svdtune.errors import SvdtuneError, SvdtuneWarning
from svdtune.methods.injection import by_kind
from svdtune.methods.layers.experts import ExpertSlice, ExpertStack, stacks_in
from svdtune.methods.start.memory import is_sharded

# What single experts' layers are called, in the models that have them.
_NAMES = {"gate_proj", "up_proj", "down_proj", "gate_up_proj", "w1", "w2", "w3"}


def asked_stacks(model: nn.Module, targets: Collection[str]) -> dict[str, ExpertStack]:
    """The parameters that `target_parameters` names, in whole or by their last parts, by name.

    Raises:
        SvdtuneError: a name is no such parameter's, or its numbers are not all in memory.
    """
    there = dict(stacks_in(model))
    asked = {target: [name for name in there if f".{name}".endswith(f".{target}")] for target in sorted(targets)}
    if lacking := next((target for target, found in asked.items() if not found), None):
        kinds = ", ".join(f"{kind} (×{count})" for kind, count in by_kind(there).items())
        raise SvdtuneError(
            f"no tensor [experts, out, in] is named {lacking!r} (target_parameters); this model has {kinds or 'none'}. Name "
            "layers in `target_modules`"
        )
    wanted = {name for found in asked.values() for name in found}
    stacks = {name: stack for name, stack in there.items() if name in wanted}
    for name, stack in stacks.items():
        offloaded = getattr(getattr(stack.experts, "_hf_hook", None), "offload", False)
        if offloaded or is_sharded(stack) or not stack.weight.is_floating_point() or stack.weight.element_size() == 1:
            raise SvdtuneError(
                f"{name!r} (target_parameters) is quantized, offloaded or spread over processes, and an adapter of experts "
                "needs its numbers whole in memory. Load the model so, or leave `target_parameters` out"
            )
    return stacks


def expert_at(model: nn.Module, layer: str) -> ExpertSlice:
    """The expert in a base model that an adapted layer is named for."""
    parameter, _, index = layer.rpartition(".")
    module, _, key = parameter.rpartition(".")
    return ExpertSlice(ExpertStack(model.get_submodule(module), key), int(index))


def say_experts_left_out(model: nn.Module, asked: Collection[str] | str | None, adapted: Collection[str]) -> None:
    """Warn where `target_modules` asks for layers of experts, or for all, that are none here.

    Args:
        model: the base model.
        asked: `target_modules`.
        adapted: names of the parameters that `target_parameters` names.
    """
    names = {asked} if isinstance(asked, str) else set(asked or ())
    meant = "all-linear" in names or any(name.rpartition(".")[2] in _NAMES for name in names)
    experts = [name for name, _ in stacks_in(model) if "expert" in name.split(".")[-2].lower()]
    if meant and (left_out := [name for name in experts if name not in adapted]):
        warnings.warn(
            f"the experts are not adapted: their weights are {len(left_out)} tensors for all experts together, such as "
            f"{left_out[0]}, which no name in `target_modules` reaches. What else it names is adapted. For the experts give "
            f"SARA or SORSA `target_parameters={sorted({'.'.join(name.split('.')[-2:]) for name in left_out})}`",
            SvdtuneWarning,
            stacklevel=2,
        )
