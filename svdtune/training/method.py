"""The method of a recipe: its PEFT configuration, checked field by field, and the model adapted
with it.

Every method of PEFT, with SARA, Mo-SARA, SORSA and the baselines that the laboratory adds to it,
takes this one path.
"""

import difflib
import typing
from collections.abc import Iterator
from typing import Any

from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel

from svdtune.errors import SvdtuneError
from svdtune.methods import registration
from svdtune.methods.injection import check_target_names, check_targets, inject
from svdtune.methods.settings import settings
from svdtune.methods.sorsa.config import stored_layout
from svdtune.names import is_named
from svdtune.registry import lab_note
from svdtune.starts import fast_starts
from svdtune.training.problems import Problem, type_error, unknown

FULL = "full"
TARGETS = "target_modules"  # the one setting of full fine-tuning: the layers that are trained
_ANY_STEPS = 10**9  # while a run's length is not known
_FROM_DATA = {"eva": "initialize_lora_eva_weights", "corda": "preprocess_corda"}


def method_names() -> list[str]:
    """Every method a recipe may name."""
    return ["sara", "mosara", "sorsa", FULL, *sorted(name.lower() for name in registration.peft_types())]


def method_problems(name: str, options: dict[str, Any]) -> Iterator[Problem]:
    """Yield everything that is wrong with a method's settings."""
    if name == FULL:
        for option, value in options.items():
            if option != TARGETS:
                yield Problem(f"method.{option}", f"full fine-tuning has no setting but {TARGETS}")
            elif not isinstance(value, list) or not value or not all(isinstance(each, str) for each in value):
                yield Problem(
                    f"method.{option}", f"expected a list of module names, such as [q_proj, v_proj]; got {value!r}"
                )
        return
    cls = class_of_method(name)
    if cls is None:
        near = difflib.get_close_matches(name.lower(), method_names(), n=1)
        hint = f"; did you mean {near[0]}?" if near else f"; there are {', '.join(dict.fromkeys(method_names()))}"
        yield Problem("method.name", f"{name!r} is no method{lab_note()}{hint}")
        return
    hints = typing.get_type_hints(cls)
    known = [field.name for field in settings(cls)]
    good = {}
    for option, value in options.items():
        message = type_error(hints[option], value) if option in known else unknown(option, known)
        if message:
            yield Problem(f"method.{option}", message)
        else:
            good[option] = value
    try:
        cls(**with_steps(name, good, _ANY_STEPS))
    except (ValueError, TypeError, ImportError, NotImplementedError) as error:
        yield Problem("method", str(error))


def start_problems(options: dict[str, Any]) -> Iterator[Problem]:
    """Yield what keeps LoRA from its start: PEFT takes it from data beforehand, or else begins
    with A at random and B zero, mostly without a word."""
    init = options.get("init_lora_weights")
    if isinstance(init, str) and (by := _FROM_DATA.get(init.lower())):
        yield Problem(
            "method.init_lora_weights",
            f"{init!r} starts from data that PEFT's {by} runs through the model, and a run does not call it; take true, pissa "
            "or olora, or call it in a loop of your own",
        )


def section_as_stored(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """The settings of a run that was begun, perhaps with an earlier svdtune, as this one has
    them."""
    if name == "sorsa" and "layout" in options:
        return options | {"layout": stored_layout(options["layout"])}
    return options


def build_config(name: str, options: dict[str, Any], task: str = "sft") -> PeftConfig:
    """The PEFT configuration of a method whose settings were checked; a `task` of "reward" is on a
    classifier, whose head PEFT trains and saves beside the adapter."""
    cls = class_of_method(name)
    if cls is None:
        raise SvdtuneError(f"{name!r} is no PEFT method; there are {', '.join(method_names())}{lab_note()}")
    try:
        return cls(
            **{"task_type": "SEQ_CLS" if task == "reward" else "CAUSAL_LM", **with_steps(name, options, _ANY_STEPS)}
        )
    except SvdtuneError:
        raise
    except (ValueError, TypeError) as error:
        raise SvdtuneError(f"method: {error}") from error


def with_steps(name: str, options: dict[str, Any], steps: int) -> dict[str, Any]:
    """The settings, with AdaLoRA's `total_step` filled in where the recipe leaves it to the length
    of the run."""
    return {"total_step": steps, **options} if name == "adalora" else options


def adapt(
    model: PreTrainedModel, name: str, options: dict[str, Any], task: str = "sft", commit: str | None = None
) -> PreTrainedModel | PeftModel:
    """Put the method's adapter on the model; `full` trains the model itself, or the layers that its
    `target_modules` name (SORSA, Appendix B.1).

    Raises:
        SvdtuneError: if no module is adapted, or a target name matches only some of its like.
    """
    if name == FULL:
        return _trained(model, options.get(TARGETS))
    config = build_config(name, options, task)
    check_targets(model, config)
    config.revision = commit  # which AutoPeftModel loads, and svdtune
    with fast_starts():  # exact, so that a saved adapter finds its start again
        return inject(model, config)


def _trained(model: PreTrainedModel, targets: list[str] | None) -> PreTrainedModel:
    if targets is None:
        return model.requires_grad_(True)
    check_target_names(model, targets)
    model.requires_grad_(False)
    for name, module in model.named_modules():
        if any(is_named(name, target) for target in targets):
            module.requires_grad_(True)
    return model


def class_of_method(name: str) -> type[PeftConfig] | None:
    """The configuration class of a method of PEFT; None where there is no such method."""
    return registration.config_class(name.upper()) if name == name.lower() else None
