"""Settings of a recipe that exclude or need each other."""

from collections.abc import Callable, Iterator
from typing import Any

from svdtune.training.problems import Problem

# What other tasks have one way of: section, setting, value.
_OF_SFT: tuple[tuple[str, str, Any], ...] = (
    ("data", "loss_on", "response"),
    ("training", "padding_free", False),
    ("training", "packing", False),
    ("training", "group_by_length", False),
    ("training", "label_smoothing", 0),
)

BY_EVALUATIONS = ("reduce_lr_on_plateau", "greedy")  # schedules that look at what evaluation measures


def _of_the_best(get: Callable[[str, str], Any], begun: bool) -> Iterator[Problem]:
    """What choosing by evaluations takes, which they are chosen by."""
    choosing = [name for name in ("early_stopping_patience", "load_best_model_at_end") if get("training", name)]
    held_out, metric, every = (
        get("data", "eval"),
        get("training", "metric_for_best_model"),
        get("training", "eval_steps"),
    )
    measured = get("training", "schedule") in BY_EVALUATIONS
    if measured and get("training", "warmup") and not begun:
        yield Problem("training.warmup", f"is for other schedules: {get('training', 'schedule')} does not warm up")
    for name in [*choosing, *["schedule"] * (measured and not begun)]:
        if every is None:
            yield Problem(f"training.{name}", "needs training.eval_steps, how often data.eval is evaluated on")
        if name == "load_best_model_at_end" and every is not None and get("training", "save_steps") != every:
            yield Problem(
                f"training.{name}",
                f"needs training.save_steps to be training.eval_steps, {every}: the best is a checkpoint",
            )
        named = isinstance(held_out, dict) and "source" not in held_out
        if named and metric is None:
            what = " or ".join(f"{name}_loss" for name in held_out)
            yield Problem("training.metric_for_best_model", f"is required, for data.eval has several sets: {what}")
            return
    if metric is not None and not choosing and not measured:
        yield Problem(
            "training.metric_for_best_model",
            f"is for early_stopping_patience, load_best_model_at_end or the schedules {' and '.join(BY_EVALUATIONS)}",
        )


def exclusions(settings: dict[str, Any], *, begun: bool = False) -> Iterator[Problem]:
    """Settings that exclude or need each other; looked for even where other settings are wrong. A
    run that was begun may have some that are refused by now."""

    def get(section: str, name: str) -> Any:
        found = settings.get(section)
        return found.get(name) if isinstance(found, dict) else None

    if get("training", "epochs") is not None and get("training", "max_steps") is not None:
        yield Problem("training.epochs", "excludes training.max_steps; give one of them")
    if get("training", "eval_steps") is not None and get("data", "eval") is None:
        yield Problem("training.eval_steps", "needs data.eval, the rows to evaluate on")
    yield from _of_the_best(get, begun)
    if get("training", "compile") == "graph":
        if not get("training", "packing"):
            yield Problem("training.compile", "graph needs training.packing: true, by which all batches have one shape")
        if get("training", "gradient_checkpointing"):
            yield Problem(
                "training.gradient_checkpointing",
                "reads the random state, which a CUDA graph cannot: leave one of them out",
            )
    if get("method", "name") == "adalora" and get("training", "label_smoothing"):
        yield Problem(
            "training.label_smoothing",
            "takes the place of the model's own loss, and AdaLoRA's regularizer with it: leave it out",
        )
    full_fp16 = get("method", "name") == "full" and get("model", "dtype") == "float16"
    if full_fp16 and get("training", "precision") == "fp16":
        yield Problem("training.precision", "fp16 cannot train weights stored in float16; set model.dtype to float32")
    task = get("training", "task")
    if task == "grpo":
        if not get("training", "rewards"):
            yield Problem("training.rewards", "is required: grpo learns from what its answers are worth")
        if get("data", "overlong") == "cut":
            yield Problem("data.overlong", "is cut, and a prompt that is cut asks something else; give drop or error")
    elif get("training", "rewards"):
        yield Problem("training.rewards", "is for training.task: grpo")
    if task in (None, "sft"):
        return
    for section, name, usual in _OF_SFT:
        if get(section, name) not in (None, usual):
            yield Problem(f"{section}.{name}", f"is for training.task: sft; {task} has it as {usual!r}: leave it out")
    if task in ("dpo", "reward") and get("data", "completion") not in (None, "completion"):
        yield Problem(
            "data.completion", f"is for training.task: sft or kto; {task} reads the columns chosen and rejected"
        )
    if task == "kto" and get("training", "batch_size") == 1:
        yield Problem("training.batch_size", "is 1; kto compares each answer with another of its batch: give 2 or more")
