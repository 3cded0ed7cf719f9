"""Hugging Face's Trainer, set up from a recipe; it adds tokens a second and L_reg to every log, and
seals checkpoints."""

import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import SchedulerType, Trainer
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from svdtune import processes
from svdtune.data.encoding import IGNORED
from svdtune.errors import SvdtuneError
from svdtune.methods.sorsa.regularizer import SorsaRegularizer
from svdtune.methods.sorsa.sharded import whole
from svdtune.training.adalora import all_ranks, load_state, save_state
from svdtune.training.arguments import optimizer_error
from svdtune.training.callbacks import is_measured
from svdtune.training.checkpoints import WrittenBy, checkpoint_folder, discard, fault, keep_newest, note_processes, seal
from svdtune.training.collators import fill_up
from svdtune.training.compilation import any_number_of_rows
from svdtune.training.exclusions import BY_EVALUATIONS
from svdtune.training.packing import TOKENS
from svdtune.training.sharded_state import saved_state, spread_optimizer_state, whole_optimizer_state


class RunTrainer(Trainer):
    """Trainer that counts tokens without waiting for the device, logs L_reg to every tracker, and
    seals its checkpoints.

    Under FSDP2 its checkpoints are those of one process, and factors keep their own dtype: rounded
    to bf16 before a layer forms differences of them, as FSDP's mixed precision would, they lose
    what was trained. Autocast rounds afterwards.

    Args:
        regularizer: SORSA's, applied by itself at the optimizer step; here only read.
        learning_rate_ratios: by a part of a parameter's name, what its learning rate is multiplied
            by.
        keep_checkpoints: how many; older ones are deleted once a newer one is sealed.
        **kwargs: of `Trainer`.
    """

    def __init__(
        self,
        *,
        regularizer: SorsaRegularizer,
        keep_checkpoints: int = 1,
        learning_rate_ratios: Mapping[str, float] | None = None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.learning_rate_ratios = dict(learning_rate_ratios or {})
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
        if self.args.load_best_model_at_end and (self.is_fsdp2 or self.is_deepspeed_enabled):
            raise processes.everywhere(
                "training.load_best_model_at_end cannot load a checkpoint into a model that FSDP or DeepSpeed spread; leave "
                "it out, and name the checkpoint that you want of those that keep_checkpoints keeps"
            )

    def create_optimizer(self, *model: Any) -> torch.optim.Optimizer:
        """Trainer's, with a group of its own for each ratio of the learning rate. Transformers 4
        takes no model, and gives none."""
        made = self.optimizer is None
        try:
            optimizer = super().create_optimizer(*model)
        except (ImportError, ValueError) as error:
            raise optimizer_error(self.args, error) from error
        if made and self.learning_rate_ratios:
            named: Any = next((given for given in model if given is not None), self.model)
            split_groups(optimizer, {p: name for name, p in named.named_parameters()}, self.learning_rate_ratios)
        return optimizer

    def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        if self.args.greater_is_better and SchedulerType(self.args.lr_scheduler_type).value in BY_EVALUATIONS:
            given: Any = self.args.lr_scheduler_kwargs or {}
            self.args.lr_scheduler_kwargs = {"mode": "max", **given}
        try:
            return super().create_scheduler(*args, **kwargs)
        except (TypeError, ValueError) as error:
            name = SchedulerType(self.args.lr_scheduler_type).value
            raise SvdtuneError(
                f"training.schedule: {name} cannot be made: {error}; what it takes is given in training.trl: "
                "{lr_scheduler_kwargs: {...}}"
            ) from error

    def get_train_dataloader(self) -> DataLoader[Any]:
        if not self.args.auto_find_batch_size:
            # Transformers 4 resumes with the batches of whoever wrote the checkpoint.
            self._train_batch_size = self.args.train_batch_size
        loader = super().get_train_dataloader()
        # Label smoothing, and models that are not told how many labels a step has, take the mean
        # over a batch's labels, of which there must be some.
        if self.args.label_smoothing_factor == 0 and self.model_accepts_loss_kwargs:
            fill_up(loader)
        return loader

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        self.count(inputs)
        return super().training_step(model, inputs, num_items_in_batch)

    def count(self, inputs: Any) -> None:
        """Count the tokens of a batch that are no padding."""
        counted = inputs.get(TOKENS)
        self._tokens = self._tokens + (inputs["attention_mask"].sum() if counted is None else counted)

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        prepared = super()._prepare_inputs({name: value for name, value in inputs.items() if name != TOKENS})
        any_number_of_rows(prepared)
        return prepared

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.resumed_at is None:
            self.resumed_at = self.state.global_step
        if self.state.global_step >= self.state.max_steps or self.control.should_training_stop:
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
            best = self.state.best_model_checkpoint if self.args.load_best_model_at_end else None
            keep_newest(run, self.keep_checkpoints, Path(best) if best else None)

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

    def get_eval_dataloader(self, *args: Any) -> DataLoader[Any]:
        loader = super().get_eval_dataloader(*args)
        fill_up(loader)
        return loader

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's, which takes the mean of the batches' losses; where those are means over
        labels, it becomes the mean over all labels, whatever the batches were."""
        self._held_out: list[tuple[Tensor, Tensor]] = []
        output: Any = super().evaluation_loop(*args, **kwargs)
        counted = [(float(loss), int(labels)) for loss, labels in self._held_out if labels]
        mine = sum(loss * labels for loss, labels in counted), sum(labels for _, labels in counted)
        sums, labels = zip(*processes.gather(mine), strict=True)
        if sum(labels):
            output.metrics[f"{kwargs['metric_key_prefix']}_loss"] = sum(sums) / sum(labels)
        return output

    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if "labels" not in inputs:
            return super().prediction_step(model, inputs, *args, **kwargs)
        inputs = self._prepare_inputs(inputs)
        labels = (inputs["labels"][..., 1:] != IGNORED).sum()  # smoothing takes them out of the inputs
        with torch.no_grad(), self.compute_loss_context_manager():
            loss: Any = self.compute_loss(model, inputs)
        self._held_out.append((loss, labels))
        return loss, None, None

    def _evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Trainer's, after which a schedule that looks at evaluations takes its step."""
        try:
            metrics: dict[str, float] = super()._evaluate(*args, **kwargs)
        except KeyError as error:
            if "metric_for_best_model" not in str(error):
                raise
            now = [line for line in self.state.log_history if line["step"] == self.state.global_step]
            raise self._unmeasured(name for line in now for name in line if name.startswith("eval_")) from error
        return metrics

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        try:
            return super()._determine_best_metric(metrics, trial)
        except KeyError as error:
            raise self._unmeasured(metrics) from error

    def _unmeasured(self, measured: Iterable[str]) -> SvdtuneError:
        """The one sentence about a metric that evaluation does not have."""
        return SvdtuneError(
            f"training.metric_for_best_model is {self.args.metric_for_best_model}, which evaluation does not measure; it "
            f"measures {', '.join(name for name in measured if is_measured(name))}"
        )

    def _load_best_model(self) -> None:
        best = Path(str(self.state.best_model_checkpoint))
        if reason := fault(best):
            raise SvdtuneError(f"{best}, the best checkpoint, cannot be loaded: {reason}")
        super()._load_best_model()
        load_state(self.model, best)

    def _maybe_log_save_evaluate(self, tr_loss: Any, grad_norm: Any, *args: Any, **kwargs: Any) -> None:
        if self.control.should_log and isinstance(grad_norm, Tensor):
            grad_norm = whole(grad_norm)  # torch 2.8 would log this process's part of it
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            now, tokens = time.monotonic(), sum(processes.gather(int(self._tokens)))
            logs["tokens_per_second"] = round((tokens - self._logged_tokens) / max(now - self._logged_at, 1e-9), 1)
            self._logged_tokens, self._logged_at = tokens, now
            if self.regularizer.hook is not None and self.regularizer.hook.last is not None:
                logs["l_reg"] = float(self.regularizer.hook.last)
        super().log(logs, start_time)


def split_groups(
    optimizer: torch.optim.Optimizer, names: Mapping[torch.nn.Parameter, str], ratios: Mapping[str, float]
) -> None:
    """Give parameters a group of the optimizer for each ratio of the learning rate.

    Args:
        optimizer: that has not stepped yet.
        names: of its parameters.
        ratios: by a part of a name between its dots, such as `lora_B`. Where a name has several of
            them, the first counts.

    Raises:
        SvdtuneError: if no parameter has one of the parts.
    """
    parts = {
        name: name.split(".") for group in optimizer.param_groups for name in map(names.__getitem__, group["params"])
    }
    for part in ratios:
        if not any(part in found for found in parts.values()):
            there = sorted({piece for found in parts.values() for piece in found if not piece.isdigit()})
            raise SvdtuneError(
                f"training.learning_rate_ratios: no parameter that is trained has the part {part!r} in its name; there are "
                f"{', '.join(there)}"
            )
    for group in list(optimizer.param_groups):
        split: dict[str | None, list[Any]] = {None: []}
        for parameter in group["params"]:
            found = parts[names[parameter]]
            split.setdefault(next((part for part in ratios if part in found), None), []).append(parameter)
        group["params"] = split.pop(None)
        for chosen, parameters in split.items():
            assert chosen is not None
            optimizer.add_param_group({**group, "params": parameters, "lr": group["lr"] * ratios[chosen]})
