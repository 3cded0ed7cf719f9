"""The method of a recipe: its PEFT configuration, checked field by field, and the model adapted with it.

Every method of PEFT, with SARA, Mo-SARA, SORSA and the baselines that svdtune adds to it, takes this one path.
"""

import difflib
import json
import re
import typing
from collections import Counter
from collections.abc import Iterator
from typing import Any

from peft import PeftConfig, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from pydantic import PydanticSchemaGenerationError, PydanticUserError, TypeAdapter, ValidationError
from torch import nn
from transformers import PreTrainedModel

import svdtune.baselines
import svdtune.methods  # noqa: F401  both register their methods with PEFT
from svdtune.errors import SvdtuneError
from svdtune.methods.settings import settings
from svdtune.training.problems import Problem, unknown

FULL = "full"
_ANY_STEPS = 10**9  # while a run's length is not known


def method_names() -> list[str]:
    """Every method a recipe may name."""
    return ["sara", "mosara", "sorsa", FULL, *sorted({m.value.lower() for m in PEFT_TYPE_TO_CONFIG_MAPPING})]


def method_problems(name: str, options: dict[str, Any]) -> Iterator[Problem]:
    """Yield everything that is wrong with a method's settings."""
    if name == FULL:
        for option in options:
            yield Problem(f"method.{option}", "full fine-tuning has no settings of its own")
        return
    cls = config_class(name)
    if cls is None:
        near = difflib.get_close_matches(name.lower(), method_names(), n=1)
        hint = f"; did you mean {near[0]}?" if near else f"; there are {', '.join(dict.fromkeys(method_names()))}"
        yield Problem("method.name", f"{name!r} is no method{hint}")
        return
    hints = typing.get_type_hints(cls)
    known = [field.name for field in settings(cls)]
    good = {}
    for option, value in options.items():
        message = _type_error(hints[option], value) if option in known else unknown(option, known)
        if message:
            yield Problem(f"method.{option}", message)
        else:
            good[option] = value
    try:
        cls(**with_steps(name, good, _ANY_STEPS))
    except (ValueError, TypeError, ImportError, NotImplementedError) as error:
        yield Problem("method", str(error))


def build_config(name: str, options: dict[str, Any]) -> PeftConfig:
    """The PEFT configuration of a method whose settings were checked."""
    cls = config_class(name)
    if cls is None:
        raise SvdtuneError(f"{name!r} is no PEFT method; there are {', '.join(method_names())}")
    try:
        return cls(**{"task_type": "CAUSAL_LM", **with_steps(name, options, _ANY_STEPS)})
    except SvdtuneError:
        raise
    except (ValueError, TypeError) as error:
        raise SvdtuneError(f"method: {error}") from error


def with_steps(name: str, options: dict[str, Any], steps: int) -> dict[str, Any]:
    """The settings, with AdaLoRA's `total_step` filled in where the recipe leaves it to the length of the run."""
    return {"total_step": steps, **options} if name == "adalora" else options


def adapt(
    model: PreTrainedModel, name: str, options: dict[str, Any], *, low_cpu_mem_usage: bool = False
) -> PreTrainedModel | PeftModel:
    """Put the method's adapter on the model; `full` trains the model itself.

    Args:
        model: the base model.
        name: the method.
        options: its settings.
        low_cpu_mem_usage: as in `peft.get_peft_model`: the adapter's parameters are on the meta device, nothing is decomposed.

    Raises:
        SvdtuneError: if no module is adapted, or a target name matches only some of its like.
    """
    if name == FULL:
        return model.requires_grad_(True)
    config = build_config(name, options)
    targets = options.get("target_modules")
    if isinstance(targets, list):
        _check_targets(model, targets, config)
    try:
        adapted = get_peft_model(model, config, low_cpu_mem_usage=low_cpu_mem_usage)
    except SvdtuneError:
        raise
    except ValueError as error:
        if "target modules" not in str(error).lower():
            raise SvdtuneError(f"the method {name} cannot be put on this model: {error}") from error
        raise SvdtuneError(
            f"no module matches method.target_modules = {targets!r}; {_offer(model, targets)}"
        ) from error
    if not config.is_prompt_learning and not adapted_modules(adapted):
        raise SvdtuneError(f"no module matches method.target_modules = {targets!r}; {_offer(model, targets)}")
    return adapted


def adapted_modules(model: nn.Module) -> list[str]:
    """Names, as in the base model, of the modules that carry an adapter."""
    found = (name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))
    return [re.sub(r"^base_model\.model\.", "", name) for name in found]


def by_kind(names: list[str]) -> Counter[str]:
    """Count module names by what they are in their layer: "self_attn.q_proj" → 30."""
    return Counter(re.sub(r"^.*?\.\d+\.", "", name) for name in names)


def config_class(name: str) -> type[PeftConfig] | None:
    """The configuration class of a method of PEFT; None where there is no such method."""
    return {m.value.lower(): cls for m, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items()}.get(name)


def _type_error(hint: Any, value: Any) -> str | None:
    """What is wrong with a value, by a PEFT configuration's type hint; None also where the hint cannot be checked."""
    try:
        adapter = TypeAdapter(hint)
    except (PydanticSchemaGenerationError, PydanticUserError):
        return None
    try:
        # From JSON, a list may become a tuple or a set, and a text an enum; otherwise types must match exactly.
        adapter.validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        expected = dict.fromkeys(item["msg"].removeprefix("Input should be ") for item in error.errors())
        return f"expected {' or '.join(expected)}; got {value!r:.60}"
    return None


def _linear_like(model: nn.Module) -> list[str]:
    """Names of the modules that could be adapted: those with a weight matrix of their own."""
    return [
        name
        for name, module in model.named_modules()
        if getattr(getattr(module, "weight", None), "ndim", 0) >= 2 and not isinstance(module, nn.Embedding)
    ]


def _check_targets(model: nn.Module, targets: list[str], config: PeftConfig) -> None:
    """Refuse target names that match nothing, or only some of the modules of their kind without that being asked for."""
    chosen = any(getattr(config, key, None) for key in ("layers_to_transform", "exclude_modules"))
    everything = [name for name, _ in model.named_modules() if name]
    for target in targets:
        matched = [name for name in everything if name == target or name.endswith(f".{target}")]
        if not matched:
            raise SvdtuneError(f"no module is named {target!r} (method.target_modules); {_offer(model, [target])}")
        kind = target.rpartition(".")[2]
        alike = [name for name in everything if name.rpartition(".")[2] == kind]
        if len(matched) < len(alike) and not chosen and re.search(r"(^|\.)\d+\.", target):
            raise SvdtuneError(
                f"{target!r} (method.target_modules) matches only {len(matched)} of the {len(alike)} modules named "
                f"{kind!r}; name {kind!r}, and if you mean single layers, method.layers_to_transform"
            )


def _offer(model: nn.Module, targets: Any) -> str:
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
