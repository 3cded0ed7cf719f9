"""What a recipe's training section is to the trainer of its task: TRL's configuration, every value
of which a recipe decides."""

import importlib.util
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

import torch
from transformers import Trainer, TrainingArguments
from transformers.integrations.integration_utils import get_available_reporting_integrations
from transformers.training_args import OptimizerNames
from transformers.utils.import_utils import is_torch_tf32_available

from svdtune import processes
from svdtune.errors import SvdtuneError
from svdtune.system import needs
from svdtune.training.compilation import LIGER_BESIDE, compiles
from svdtune.training.recipe import Recipe
from svdtune.training.trl_settings import HANDED_ON, RAISED

CONFIGURATIONS = {
    "sft": "SFTConfig",
    "dpo": "DPOConfig",
    "kto": "KTOConfig",
    "reward": "RewardConfig",
    "grpo": "GRPOConfig",
}
OPTIMIZERS_OF_TORCH = ("adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop", "adafactor")
_PRECISION = "ACCELERATE_MIXED_PRECISION"
_ANSWERS = 8  # of GRPO to each prompt, unless the recipe says otherwise


@contextmanager
def own_precision() -> Iterator[None]:
    """Let a run's precision end with it. Transformers 4 writes it into the environment, where the
    next run of this process would find it and compute in it too."""
    before = os.environ.get(_PRECISION)
    try:
        yield
    finally:
        os.environ.pop(_PRECISION, None)
        if before is not None:
            os.environ[_PRECISION] = before


def training_arguments(recipe: Recipe, rows: int) -> TrainingArguments:
    """Translate a recipe's training section.

    Args:
        recipe: the recipe.
        rows: how many examples there are, to turn a warmup share into steps.

    Raises:
        SvdtuneError: if this machine lacks what the recipe asks for.
    """
    t = recipe.training
    if t.precision == "fp16" and not torch.cuda.is_available():
        raise SvdtuneError("training.precision: fp16 needs a CUDA device; use bf16 or fp32")
    if t.compile == "graph" and not torch.cuda.is_available():
        raise SvdtuneError("training.compile: graph needs a CUDA device, which records the step; use true or false")
    if t.compile == "graph" and (processes.launched() > 1 or processes.under_deepspeed() or processes.under_fsdp()):
        raise SvdtuneError(
            "training.compile: graph records the step of one process with a whole model; use true or false"
        )
    installed = get_available_reporting_integrations()
    if missing := [tracker for tracker in t.report_to if tracker not in installed]:
        raise SvdtuneError(
            f"training.report_to: {', '.join(missing)} not installed here; installed are {', '.join(installed) or 'none'}"
        )
    try:
        args = configuration_class(t.task)(**_decided(recipe, rows), **t.trl)
        args.get_process_log_level()
    except (*RAISED, ImportError) as error:
        reason = f"there is no {error}" if isinstance(error, KeyError) else error
        raise SvdtuneError(f"the training section cannot be used here: {reason}") from error
    if t.task == "reward":
        # Liger's would put a language model's forward in place of the classifier's.
        args.liger_kernel_config = {**(args.liger_kernel_config or {}), "fused_linear_cross_entropy": False}
    if compiles(recipe, total_steps(recipe, rows)):
        args.liger_kernel_config = {**LIGER_BESIDE, **(args.liger_kernel_config or {})}
    if processes.under_deepspeed():
        _check_deepspeed(args)
    if args.n_gpu > 1:
        # one process, one GPU: DataParallel would split batches and copy the adapter every step
        args._n_gpu = 1
    return args


def check_optimizer(args: TrainingArguments) -> None:
    """Look up the optimizer as Trainer will, for a model of one layer: most need a package.

    Raises:
        SvdtuneError: if it cannot be used here, with what to install.
    """
    asked = copy(args)
    if asked.optim_target_modules is not None:
        asked.optim_target_modules = "all-linear"  # whose names only the model knows
    try:
        Trainer.get_optimizer_cls_and_kwargs(asked, cast(Any, torch.nn.Sequential(torch.nn.Linear(1, 1))))
    except (ImportError, ValueError, NotImplementedError) as error:
        raise optimizer_error(args, error) from error


def optimizer_error(args: TrainingArguments, error: Exception) -> SvdtuneError:
    """The one sentence about an optimizer that Trainer cannot make."""
    name = OptimizerNames(args.optim).value
    others = ", ".join(OPTIMIZERS_OF_TORCH)
    return SvdtuneError(f"training.optimizer: {name} cannot be used here: {error}; {others} need no other package")


def _decided(recipe: Recipe, rows: int) -> dict[str, Any]:
    """The arguments that a recipe's own settings stand for, by the trainer's names."""
    t = recipe.training
    decided: dict[str, Any] = {
        **{name: getattr(t, setting) for name, setting in HANDED_ON.items()},
        "output_dir": str(Path(recipe.output.dir)),
        "num_train_epochs": t.epochs or 1.0,
        "max_steps": t.max_steps or -1,
        "lr_scheduler_type": "constant_with_warmup" if t.schedule == "constant" else t.schedule,
        "warmup_steps": warmup_steps(recipe, rows),
        "tf32": True if t.tf32 and is_torch_tf32_available() else None,
        "bf16": t.precision == "bf16" and not processes.under_deepspeed(),
        "fp16": t.precision == "fp16",
        "use_cpu": not torch.accelerator.is_available(),
        "logging_first_step": True,
        "logging_nan_inf_filter": False,  # a loss that is NaN is to be seen
        "eval_strategy": "steps" if t.eval_steps else "no",
        "metric_for_best_model": t.metric_for_best_model
        or ("loss" if t.load_best_model_at_end or t.early_stopping_patience else None),
        "save_strategy": "steps" if t.save_steps else "no",
        "save_steps": t.save_steps or 500,
        "report_to": t.report_to or "none",
        "run_name": Path(recipe.output.dir).name,
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "ddp_find_unused_parameters": False,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "use_liger_kernel": _uses_liger(t.liger),
        **_renamed(t.gradient_checkpointing, t.group_by_length),
    }
    if t.task == "grpo":
        # an evaluation's batch holds all answers to a prompt
        answers = t.trl.get("num_generations_eval") or t.trl.get("num_generations") or _ANSWERS
        return decided | {"per_device_eval_batch_size": math.lcm(t.batch_size, answers)}
    # Rows come encoded, cut and packed.
    decided["max_length"] = None
    if t.task == "sft":
        decided |= {"label_names": ["labels"], "packing": False, "padding_free": False}
    return decided


def _uses_liger(wanted: bool | None) -> bool:
    """Whether Liger's kernels take the place of the model's norms, rotations and activations."""
    installed = importlib.util.find_spec("liger_kernel") is not None
    if wanted and not installed:
        raise SvdtuneError("training.liger: true needs Liger's kernels: pip install 'svdtune[liger]'")
    return wanted if wanted is not None else installed and torch.cuda.is_available()


def configuration_class(task: str) -> type[TrainingArguments]:
    """TRL's configuration of a task's trainer.

    Raises:
        SvdtuneError: if TRL is not installed.
    """
    with needs("training needs TRL", "train"):
        import trl
    found: type[TrainingArguments] = getattr(trl, CONFIGURATIONS[task])
    return found


def _check_deepspeed(args: TrainingArguments) -> None:
    plugin: Any = args.deepspeed_plugin
    for section in ("bf16", "fp16"):
        if plugin.deepspeed_config.get(section, {}).get("enabled") is True:
            raise SvdtuneError(
                f"DeepSpeed's {section} section rounds the adapter itself to 16 bits. In its configuration set "
                f'"{section}": {{"enabled": false}} and "torch_autocast": {{"enabled": true, "dtype": "bfloat16"}}, as '
                "configs/accelerate/zero2.json does"
            )


def _renamed(checkpointing: bool, by_length: bool) -> dict[str, Any]:
    """Arguments that Transformers has renamed, under the names this version has."""
    known = {field.name for field in fields(TrainingArguments)}
    name = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    renamed: dict[str, Any] = {name: checkpointing}
    if checkpointing:
        # Reentrant checkpointing would need inputs that require gradients, which a frozen embedding
        # does not give.
        renamed[f"{name}_kwargs"] = {"use_reentrant": False}
    if by_length:
        strategy = {"train_sampling_strategy": "group_by_length"}
        renamed |= strategy if "train_sampling_strategy" in known else {"group_by_length": True}
    return renamed


def total_steps(recipe: Recipe, rows: int) -> int:
    """Optimizer steps of the whole run."""
    t = recipe.training
    if t.max_steps is not None:
        return t.max_steps
    batches = math.ceil(rows / (t.batch_size * processes.launched()))
    return math.ceil((t.epochs or 1.0) * math.ceil(batches / t.gradient_accumulation))


def warmup_steps(recipe: Recipe, rows: int) -> int:
    """The warmup in optimizer steps."""
    warmup = recipe.training.warmup
    return int(warmup) if warmup >= 1 else math.ceil(warmup * total_steps(recipe, rows))
