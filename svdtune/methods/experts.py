"""Experts whose weights are one tensor [experts, out, in] instead of a layer each. No module name
reaches them; `target_parameters` names them."""

import re
import warnings
from collections.abc import Collection

from torch import nn

from svdtune.errors import SvdtuneError, SvdtuneWarning
from svdtune.methods.config import SvdConfig
from svdtune.methods.injection import by_kind
from svdtune.methods.layers.experts import ExpertSlice, ExpertStack, FusedExperts, stacks_in
from svdtune.methods.start.memory import has_sharded_weight
from svdtune.names import is_named

# What single experts' layers are called, in the models that have them.
_NAMES = {"gate_proj", "up_proj", "down_proj", "gate_up_proj", "w1", "w2", "w3"}


def asked_stacks(model: nn.Module, config: SvdConfig) -> dict[str, ExpertStack]:
    """The parameters to adapt, by name. `target_parameters` names them, in whole or by their last
    parts. `exclude_modules` takes some out, by their own names or by their modules' names.

    Raises:
        SvdtuneError: a name is no such parameter's, or every parameter is excluded; one lies in a
            module of `modules_to_save`, has a name that is taken, or is not all in memory.
    """
    there = dict(stacks_in(model))
    targets = sorted(config.target_parameters or ())
    asked = {target: [name for name in there if is_named(name, target)] for target in targets}
    if lacking := next((target for target, found in asked.items() if not found), None):
        kinds = ", ".join(f"{kind} (×{count})" for kind, count in by_kind(list(filter(_is_free, there))).items())
        raise SvdtuneError(
            f"no tensor [experts, out, in] is named {lacking!r} (target_parameters); this model has {kinds or 'none'}. Name "
            "layers in `target_modules`"
        )
    named = {name for found in asked.values() for name in found}
    wanted = {name for name in named if not _is_excluded(name, config)}
    if wanted != named:  # PEFT looks at modules alone, and the tuner takes the filter off again
        warnings.filterwarnings("ignore", "You have passed exclude_modules")
    if named and not wanted:
        raise SvdtuneError(
            f"`exclude_modules` names every parameter that `target_parameters` does ({', '.join(targets)}), so no expert is "
            "left to adapt. Leave them out of one of the two"
        )
    for name in sorted(wanted):
        _check_place(name, config)
    stacks = {name: stack for name, stack in there.items() if name in wanted}
    for name, stack in stacks.items():
        offloaded = getattr(getattr(stack.experts, "_hf_hook", None), "offload", False)
        if (
            offloaded
            or has_sharded_weight(stack)
            or not stack.weight.is_floating_point()
            or stack.weight.element_size() == 1
        ):
            raise SvdtuneError(
                f"{name!r} (target_parameters) is quantized, offloaded or spread over processes, and an adapter of experts "
                "needs its numbers whole in memory. Load the model so, or leave `target_parameters` out"
            )
    return stacks


def _is_excluded(name: str, config: SvdConfig) -> bool:
    """Whether `exclude_modules` names a parameter or its module, as PEFT matches names."""
    excluded = config.exclude_modules or ()
    names = name, name.rpartition(".")[0]
    if isinstance(excluded, str):
        return any(re.fullmatch(excluded, one) for one in names)
    return any(is_named(one, key) for one in names for key in excluded)


def _is_free(name: str) -> bool:
    """Whether a parameter's name is free for the experts' layers: PEFT's layers have no attribute
    of that name."""
    return not hasattr(FusedExperts, name.rpartition(".")[2])


def _check_place(name: str, config: SvdConfig) -> None:
    """Raise `SvdtuneError` for a parameter where the experts' layers cannot stand."""
    if not _is_free(name):
        raise SvdtuneError(
            f"{name!r} (target_parameters) cannot be adapted: PEFT's layers have an attribute {name.rpartition('.')[2]!r} of "
            "their own, so the experts' layers cannot stand under that name. Leave it out of `target_parameters`"
        )
    parts = name.split(".")
    around = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
    # PEFT compares the ends of names, and a match may begin within a part
    if saved := next((key for key in config.modules_to_save or () if any(one.endswith(key) for one in around)), None):
        raise SvdtuneError(
            f"{name!r} (target_parameters) lies in {saved!r}, which `modules_to_save` trains and saves whole, so an adapter "
            "there could not be loaded. Leave it out of one of the two"
        )


def expert_at(model: nn.Module, layer: str) -> ExpertSlice:
    """The expert in a base model that belongs to an adapted layer's name."""
    parameter, _, index = layer.rpartition(".")
    module, _, key = parameter.rpartition(".")
    return ExpertSlice(ExpertStack(model.get_submodule(module), key), int(index))


def say_experts_left_out(model: nn.Module, asked: Collection[str] | str | None, adapted: Collection[str]) -> None:
    """Warn if `target_modules` asks for experts, or for all layers, and the model's experts are no
    layers.
    """
    names = {asked} if isinstance(asked, str) else set(asked or ())
    meant = "all-linear" in names or any(name.rpartition(".")[2] in _NAMES for name in names)
    experts = [name for name, _ in stacks_in(model) if "expert" in name.split(".")[-2].lower() and _is_free(name)]
    if meant and (left_out := [name for name in experts if name not in adapted]):
        warnings.warn(
            f"the experts are not adapted: their weights are {len(left_out)} tensors for all experts together, such as "
            f"{left_out[0]}, which no name in `target_modules` reaches. What else it names is adapted. For the experts give "
            f"SARA or SORSA `target_parameters={sorted({'.'.join(name.split('.')[-2:]) for name in left_out})}`",
            SvdtuneWarning,
            stacklevel=2,
        )
