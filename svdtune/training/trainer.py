"""Hugging Face's Trainer, set up from a recipe; it adds tokens a second and L_reg to every log, and
seals checkpoints."""

import math
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments
from transformers.integrations.integration_utils import get_available_reporting_integrations
from transformers.utils.import_utils import is_torch_tf32_available

from svdtune import processes
from svdtune.errors import SvdtuneError
from svdtune.methods.sorsa.regularizer import SorsaRegularizer
from svdtune.training.adalora import all_ranks, load_state, save_state
from svdtune.training.batches import fill_up
from svdtune.training.checkpoints import WrittenBy, checkpoint_folder, discard, keep_newest, note_processes, seal
from svdtune.training.recipe import Recipe
from svdtune.training.sharded import saved_state, spread_optimizer_state, whole_optimizer_state

OPTIMIZER_NAME, SCHEDULER_NAME = "optimizer.pt", "scheduler.pt"  # Trainer's names
_SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


class RunTrainer(Trainer):
    """Trainer that counts tokens without waiting for the device, logs L_reg to every tracker, and
    seals its checkpoints.

    Under FSDP2 its checkpoints are those of one process, and factors keep their own dtype: rounded
    to bf16 before a layer forms differences of them, as FSDP's mixed precision would, they lose
    what was trained. Autocast rounds afterwards.

    Args:
        regularizer: SORSA's, applied by itself at the optimizer step; here only read.
        keep_checkpoints: how many; older ones are deleted once a newer one is sealed.
        **kwargs: of `Trainer`.
    """

    def __init__(self, *, regularizer: SorsaRegularizer, keep_checkpoints: int = 1, **kwargs: Any):
        super().__init__(**kwargs)
        self.keep_checkpoints = keep_checkpoints
        self.resumed_at: int | None = None  # the step that training started from
        self.regularizer = regularizer
        self.add_callback(regularizer)
        self._tokens: Tensor | int = 0
        self._logged_tokens, self._logged_at = 0, time.monotonic()
        self.is_fsdp2 = self.is_fsdp_enabled and getattr(self.accelerator.state.fsdp_plugin, "fsdp_version", 1) == 2
        if self.is_fsdp_enabled and not self.is_fsdp2:
            raise processes.everywhere(
                "FSDP's first version flattens what it shards, which takes the adapter's matrices apart; set fsdp_version: 2 "
                "in Accelerate's configuration, as configs/accelerate/fsdp2.yaml does"
            )
        if self.is_fsdp2:
            from torch.distributed.fsdp import MixedPrecisionPolicy

            self.accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy()

    def get_train_dataloader(self) -> DataLoader[Any]:
        loader = super().get_train_dataloader()
        # Label smoothing, and models that are not told how many labels a step has, take the mean
        # over a batch's labels, of which there must be some.
        if self.args.label_smoothing_factor == 0 and self.model_accepts_loss_kwargs:
            fill_up(loader)
        return loader

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        self._tokens = self._tokens + inputs["attention_mask"].sum()
        return super().training_step(model, inputs, num_items_in_batch)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.resumed_at is None:
            self.resumed_at = self.state.global_step
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = (
                True  # resumed after its last step, of which Trainer would take one more
            )
            return
        super()._run_epoch(*args, **kwargs)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        assert self.args.output_dir is not None
        run = Path(self.args.output_dir)
        checkpoint = checkpoint_folder(run, self.state.global_step)
        if self.args.should_save:
            discard(checkpoint)  # what a killed process left of it
        self.accelerator.wait_for_everyone()
        with all_ranks(self.model):
            super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()  # every process writes its random state
        if self.args.should_save:
            save_state(self.model, checkpoint)
            rows = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
            note_processes(checkpoint, WrittenBy(self.args.world_size, rows))
            seal(checkpoint)
            keep_newest(run, self.keep_checkpoints)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if not self.is_fsdp2 and not self.is_deepspeed_enabled:
            return super().save_model(output_dir, _internal_call)
        state = saved_state(self.accelerator.unwrap_model(self.model))
        if self.args.should_save:
            self._save(output_dir, state_dict=state)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp2:
            return super()._save_optimizer_and_scheduler(output_dir)
        assert self.optimizer is not None
        assert self.lr_scheduler is not None
        state = whole_optimizer_state(self.optimizer)
        if self.args.should_save:
            torch.save(state, Path(output_dir, OPTIMIZER_NAME))
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir, SCHEDULER_NAME))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self.is_fsdp2 or checkpoint is None:
            return super()._load_optimizer_and_scheduler(checkpoint)
        assert self.optimizer is not None
        assert self.lr_scheduler is not None
        # Read as what they are and nothing more; map_location keeps the whole off the GPU.
        state = torch.load(Path(checkpoint, OPTIMIZER_NAME), map_location="cpu", weights_only=True)
        self.optimizer.load_state_dict(spread_optimizer_state(self.optimizer, state))
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint, SCHEDULER_NAME), weights_only=True))

    def load_before_sharding(self, checkpoint: str) -> None:
        """Give the model, whole as yet, a checkpoint's values; Trainer itself looks for them in
        FSDP's own files later."""
        if self.is_fsdp2:
            self.is_fsdp_enabled = False
            self._load_from_checkpoint(checkpoint)
            self.is_fsdp_enabled = True

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.is_fsdp2 and self.is_fsdp_enabled:
            return  # see `load_before_sharding`
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        load_state(self.model, Path(resume_from_checkpoint))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            now, tokens = time.monotonic(), sum(processes.gather(int(self._tokens)))
            logs["tokens_per_second"] = round((tokens - self._logged_tokens) / max(now - self._logged_at, 1e-9), 1)
            self._logged_tokens, self._logged_at = tokens, now
            if self.regularizer.hook is not None and self.regularizer.hook.last is not None:
                logs["l_reg"] = float(self.regularizer.hook.last)
        super().log(logs, start_time)


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
    installed = get_available_reporting_integrations()
    if missing := [tracker for tracker in t.report_to if tracker not in installed]:
        raise SvdtuneError(
            f"training.report_to: {', '.join(missing)} not installed here; installed are {', '.join(installed) or 'none'}"
        )
    try:
        args = TrainingArguments(
            output_dir=str(Path(recipe.output.dir)),
            num_train_epochs=t.epochs or 1.0,
            max_steps=t.max_steps or -1,
            per_device_train_batch_size=t.batch_size,
            per_device_eval_batch_size=t.batch_size,
            gradient_accumulation_steps=t.gradient_accumulation,
            learning_rate=t.learning_rate,
            lr_scheduler_type=_SCHEDULES[t.schedule],
            warmup_steps=warmup_steps(recipe, rows),
            optim=t.optimizer,
            weight_decay=t.weight_decay,
            max_grad_norm=t.max_grad_norm,
            label_smoothing_factor=t.label_smoothing,
            tf32=True if t.tf32 and is_torch_tf32_available() else None,
            bf16=t.precision == "bf16" and not processes.under_deepspeed(),
            fp16=t.precision == "fp16",
            use_cpu=not torch.accelerator.is_available(),
            torch_compile=t.compile,
            seed=t.seed,
            logging_steps=t.logging_steps,
            logging_first_step=True,
            logging_nan_inf_filter=False,  # a loss that is NaN is to be seen
            eval_strategy="steps" if t.eval_steps else "no",
            eval_steps=t.eval_steps,
            save_strategy="steps" if t.save_steps else "no",
            save_steps=t.save_steps or 500,
            report_to=t.report_to or "none",
            run_name=Path(recipe.output.dir).name,
            disable_tqdm=True,
            remove_unused_columns=False,
            ddp_find_unused_parameters=False,
            label_names=["labels"],
            dataloader_pin_memory=torch.cuda.is_available(),
            **_renamed(t.gradient_checkpointing, t.group_by_length),
        )
    except (ValueError, ImportError) as error:
        raise SvdtuneError(f"the training section cannot be used here: {error}") from error
    if processes.under_deepspeed():
        _check_deepspeed(args)
    if args.n_gpu > 1:
        # one process, one GPU: DataParallel would split batches and copy the adapter every step
        args._n_gpu = 1
    return args


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
    renamed: dict[str, Any] = {}
    if checkpointing:
        name = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
        # Reentrant checkpointing would need inputs that require gradients, which a frozen embedding
        # does not give.
        renamed |= {name: True, f"{name}_kwargs": {"use_reentrant": False}}
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
