"""`training.trl`, held to the class that takes it: every name known, every type right, and nothing
in it that the recipe's own settings decide."""

import math
import sys
import traceback
import typing
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

from svdtune.errors import SvdtuneError
from svdtune.system import first_line, is_out_of_memory
from svdtune.training.problems import Problem, type_error, unknown

# By the names of TRL's configurations, the settings of `training` that are handed on as they are.
HANDED_ON = {
    "per_device_train_batch_size": "batch_size",
    "per_device_eval_batch_size": "batch_size",
    "gradient_accumulation_steps": "gradient_accumulation",
    "learning_rate": "learning_rate",
    "optim": "optimizer",
    "weight_decay": "weight_decay",
    "max_grad_norm": "max_grad_norm",
    "label_smoothing_factor": "label_smoothing",
    "seed": "seed",
    "logging_steps": "logging_steps",
    "eval_steps": "eval_steps",
    "load_best_model_at_end": "load_best_model_at_end",
}
# Names of TRL's configurations that the recipe says in its own words. Those of None are svdtune's:
# what it promises of its runs rests on them.
DECIDED: dict[str, str | None] = {
    **{name: f"training.{setting}" for name, setting in HANDED_ON.items()},
    "output_dir": "output.dir",
    "run_name": "output.dir",
    "num_train_epochs": "training.epochs",
    "max_steps": "training.max_steps",
    "lr_scheduler_type": "training.schedule",
    "warmup_steps": "training.warmup",
    "warmup_ratio": "training.warmup",
    "tf32": "training.tf32",
    "bf16": "training.precision",
    "fp16": "training.precision",
    "bf16_full_eval": "training.precision",  # which leaves the result rounded, evaluated before it is saved
    "fp16_full_eval": "training.precision",
    "torch_compile": "training.compile",
    "gradient_checkpointing": "training.gradient_checkpointing",
    "gradient_checkpointing_kwargs": "training.gradient_checkpointing",
    "activation_checkpointing": "training.gradient_checkpointing",
    "activation_checkpointing_kwargs": "training.gradient_checkpointing",
    "train_sampling_strategy": "training.group_by_length",
    "group_by_length": "training.group_by_length",
    "use_liger_kernel": "training.liger",
    "padding_free": "training.padding_free",
    "packing": "training.packing",
    "packing_strategy": "training.packing",
    "eval_packing": "training.packing",
    "eval_strategy": "training.eval_steps",
    "metric_for_best_model": "training.metric_for_best_model",
    "save_strategy": "training.save_steps",
    "save_steps": "training.save_steps",
    "save_total_limit": "training.keep_checkpoints",
    "report_to": "training.report_to",
    "max_length": "data.max_length",
    "truncation_mode": "data.overlong",
    "assistant_only_loss": "data.loss_on",
    "completion_only_loss": "data.loss_on",
    "dataset_text_field": "data.prompt",
    "eos_token": "model.end_token",
    "model_init_kwargs": "model",
    "trust_remote_code": "model.trust_remote_code",
    "use_cpu": None,
    "logging_first_step": None,
    "logging_nan_inf_filter": None,
    "disable_tqdm": None,
    "remove_unused_columns": None,
    "ddp_find_unused_parameters": None,
    "dataloader_pin_memory": None,
    "label_names": None,
    "resume_from_checkpoint": None,
    "ignore_data_skip": None,
    "save_only_model": None,
    "push_to_hub": None,
    "pad_token": None,
    "chat_template_path": None,
    "dataset_kwargs": None,
    "precompute_ref_log_probs": None,
    "sync_ref_model": None,
    "use_vllm": None,
    "shuffle_dataset": None,
}
# The least value of numbers that nobody else looks at: below it the noise has no range, a batch no
# length, and what is to become likelier becomes less likely.
_LEAST = {
    "beta": 0,
    "desirable_weight": 0,
    "undesirable_weight": 0,
    "epsilon": 0,
    "neftune_noise_alpha": 0,
    "num_iterations": 1,
    "num_generations": 2,
    "pad_to_multiple_of": 1,
}
# Whose code takes a value of `training.trl`, and what it raises at one that it cannot use. A
# RuntimeError is the device's, or another process's.
_LIBRARIES = {"trl", "transformers", "accelerate", "torch", "peft", "datasets"}
RAISED = (ValueError, TypeError, ArithmeticError, LookupError, AttributeError, NameError)


def trl_problems(task: str, given: dict[str, Any], *, begun: bool = False) -> Iterator[Problem]:
    """Yield everything that is wrong with a recipe's `training.trl`. A run that was begun may have
    values that are refused by now."""
    from svdtune.training.arguments import configuration_class

    if not given:
        return
    try:
        cls = configuration_class(task)
    except SvdtuneError as error:
        yield Problem("training.trl", str(error))
        return
    hints = typing.get_type_hints(cls)
    known = [field.name for field in fields(cls) if field.init]
    for name, value in given.items():
        path = f"training.trl.{name}"
        if name not in known:
            yield Problem(path, unknown(name, [other for other in known if other not in DECIDED]))
        elif name in DECIDED and not begun:
            yield Problem(path, _decided(DECIDED[name]))
        elif message := type_error(hints[name], value):
            yield Problem(path, message)
        elif begun:
            continue
        elif isinstance(value, float) and (math.isnan(value) or (name in _LEAST and math.isinf(value))):
            yield Problem(path, f"expected a finite number; got {value}")
        elif name in _LEAST and isinstance(value, int | float) and value < _LEAST[name]:
            yield Problem(path, f"expected {_LEAST[name]} or more; got {value}")
        elif (
            name == "neftune_noise_alpha"
            and value
            and (task in ("dpo", "kto") or (task == "grpo" and given.get("beta")))
        ):
            yield Problem(path, f"is for sft and reward: {task} compares with the base, which would get the noise too")


@contextmanager
def explained(given: Collection[str]) -> Iterator[None]:
    """Make one SvdtuneError of what the trainer raises because of a value in `training.trl`. What
    other code raises, such as a reward function, stays as it is.

    Args:
        given: the names in the recipe's `training.trl`.
    """
    try:
        yield
    except RAISED as error:
        if isinstance(error, SvdtuneError) or is_out_of_memory(error) or not given or not _of_libraries(error):
            raise
        raise SvdtuneError(
            f"the trainer ended with: {first_line(error)}; look at what the recipe gives it in training.trl: "
            f"{', '.join(given)}"
        ) from error


def _of_libraries(error: Exception) -> bool:
    """Whether an error came up in a library of the trainer, with nobody's code between it and
    ours."""
    frames = [str(frame.f_globals.get("__name__")) for frame, _ in traceback.walk_tb(error.__traceback__)]
    packages = [name.partition(".")[0] for name in frames]
    called = [package for package in packages if package not in sys.stdlib_module_names]
    return set(called) <= {"svdtune", *_LIBRARIES} and called[-1] in _LIBRARIES


def _decided(setting: str | None) -> str:
    if setting is None:
        return "is not the recipe's to change: what svdtune promises of its runs rests on it; leave it out"
    return f"is what {setting} of the recipe decides; set that instead"
