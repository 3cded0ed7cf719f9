"""An adapter put on a model, with errors that name what the model has near what was asked for."""

import difflib
import re
from collections import Counter
from collections.abc import Collection
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from svdtune.errors import SvdtuneError
from svdtune.names import is_named


def inject(model: nn.Module, config: PeftConfig, *, low_cpu_mem_usage: bool = False) -> PeftModel:
    """`peft.get_peft_model`, whose errors name what the model has.

    Args:
        model: the base model; it is changed.
        config: of any method.
        low_cpu_mem_usage: as in `peft.get_peft_model`: the adapter's parameters are on the meta
            device, and nothing is decomposed.

    Raises:
        SvdtuneError: no module is adapted, or PEFT cannot put the method on this model.
    """
    targets = _as_given(getattr(config, "target_modules", None))
    try:
        adapted = get_peft_model(model, config, low_cpu_mem_usage=low_cpu_mem_usage)
    except SvdtuneError:
        raise
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]  # documented, not in its __all__
        raise SvdtuneError(
            f"a weight cannot be decomposed for {method_name(config)} ({error}); check the checkpoint, or leave its layer out"
        ) from error
    except AttributeError as error:  # PEFT's starts read a weight, which fused experts do not have
        init = getattr(config, "init_lora_weights", None)
        if "'weight'" not in str(error) or not isinstance(init, str):
            raise
        raise SvdtuneError(
            f"init_lora_weights={init!r} starts layers from their weight, and {error}; name linear layers "
            "in target_modules ('all-linear' takes fused experts too)"
        ) from error
    except ValueError as error:
        if targets is None and "specify `target_modules`" in str(error):
            kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
            raise SvdtuneError(
                f"PEFT knows no default target_modules for {kind!r}; name them, or use 'all-linear'"
            ) from error
        if "target modules" not in str(error).lower():
            raise SvdtuneError(f"the method {method_name(config)} cannot be put on this model: {error}") from error
        raise SvdtuneError(_nothing_matches(model, targets)) from error
    if not config.is_prompt_learning and not any(isinstance(module, BaseTunerLayer) for module in adapted.modules()):
        raise SvdtuneError(
            f"the method {method_name(config)} adapts none of the modules that target_modules = {targets!r} names: PEFT has it "
            "for other kinds of layers. Name other modules, or take another method"
        )
    return adapted


def check_targets(model: nn.Module, config: PeftConfig) -> None:
    """Refuse a name in `target_modules` that matches nothing, or that matches only some of its kind
    by mistake.

    PEFT ignores a name that matches nothing if another one matches.

    Raises:
        SvdtuneError: naming the first of them, and what the model has that is near.
    """
    targets = _as_given(getattr(config, "target_modules", None))
    if isinstance(targets, list):
        chosen = any(getattr(config, key, None) for key in ("layers_to_transform", "exclude_modules"))
        check_target_names(model, targets, chosen)


def check_target_names(model: nn.Module, targets: list[str], chosen: bool = False) -> None:
    """As `check_targets`, for names alone. `chosen` says that another setting picks layers."""
    everything = [name for name, _ in model.named_modules() if name]
    for target in targets:
        matched = [name for name in everything if is_named(name, target)]
        if not matched:
            raise SvdtuneError(f"no module is named {target!r} (target_modules); {_offer(model, [target])}")
        kind = target.rpartition(".")[2]
        alike = [name for name in everything if name.rpartition(".")[2] == kind]
        if len(matched) < len(alike) and not chosen and re.search(r"(^|\.)\d+\.", target):
            raise SvdtuneError(
                f"{target!r} (target_modules) matches only {len(matched)} of the {len(alike)} modules named "
                f"{kind!r}; name {kind!r}, and if you mean single layers, layers_to_transform"
            )


def method_name(config: PeftConfig) -> str:
    """The method of a configuration, as a recipe names it."""
    return str(getattr(config.peft_type, "value", config.peft_type)).lower()


def by_kind(names: Collection[str]) -> Counter[str]:
    """Count modules by their names inside a layer: "self_attn.q_proj" → 30. The experts of one
    parameter are one kind."""
    return Counter(re.sub(r"^.*?\.\d+\.|\.\d+$", "", name) for name in names)


def _as_given(targets: Any) -> list[str] | str | None:
    return targets if targets is None or isinstance(targets, str) else sorted(targets)


def _nothing_matches(model: nn.Module, targets: list[str] | str | None) -> str:
    return f"no module matches target_modules = {targets!r}; {_offer(model, targets)}"


def _linear_like(model: nn.Module) -> list[str]:
    """Names of the modules that have a weight matrix of their own, and so could be adapted."""
    return [
        name
        for name, module in model.named_modules()
        if getattr(getattr(module, "weight", None), "ndim", 0) >= 2 and not isinstance(module, nn.Embedding)
    ]


def _offer(model: nn.Module, targets: list[str] | str | None) -> str:
    """The names that look most like the targets, or all there are."""
    kinds = by_kind(_linear_like(model))
    names = list(dict.fromkeys([kind.rpartition(".")[2] for kind in kinds]))
    wanted = [targets] if isinstance(targets, str) else list(targets or [])
    near = dict.fromkeys(
        match for target in wanted for match in difflib.get_close_matches(target, names, n=3, cutoff=0.4)
    )
    listing = ", ".join(
        f"{name} (×{sum(n for k, n in kinds.items() if k.rpartition('.')[2] == name)})" for name in near or names
    )
    return f"near matches: {listing}" if near else f"this model has {listing}"
