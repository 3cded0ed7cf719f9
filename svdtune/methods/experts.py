"""Experts whose weights are one tensor [experts, out, in] instead of a layer each, which no module
name reaches."""

import warnings
from collections.abc import Collection

from torch import nn

from svdtune.errors import SvdtuneWarning

# What single experts' layers are called, in the models that have them.
_NAMES = {"gate_proj", "up_proj", "down_proj", "gate_up_proj", "w1", "w2", "w3"}


def fused_experts(model: nn.Module) -> list[str]:
    """The names of the parameters that hold a weight for each of several experts."""
    return [
        f"{name}.{key}"
        for name, module in model.named_modules()
        if "expert" in name.rpartition(".")[2].lower()
        for key, parameter in module._parameters.items()
        if parameter is not None and parameter.ndim == 3
    ]


def say_experts_left_out(model: nn.Module, asked: Collection[str] | str | None) -> None:
    """Warn where `target_modules` asks for layers of experts, or for all, that are none here."""
    names = {asked} if isinstance(asked, str) else set(asked or ())
    meant = "all-linear" in names or any(name.rpartition(".")[2] in _NAMES for name in names)
    if meant and (left_out := fused_experts(model)):
        warnings.warn(
            f"the experts are not adapted: their weights are {len(left_out)} tensors for all experts together, such as "
            f"{left_out[0]}, and SARA, Mo-SARA and SORSA adapt layers. What else `target_modules` names is adapted. For the "
            "experts use LoRA with `target_parameters`",
            SvdtuneWarning,
            stacklevel=2,
        )
