"""TRL's trainers as this project runs them: sealed checkpoints, exact resume, rows that are encoded
already, and a reference that is the base itself.

TRL is imported here and nowhere else, and this module only where a run starts.
"""

import sys
import warnings
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from datasets import Dataset
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from transformers import Trainer
from transformers.trainer_pt_utils import find_batch_size
from trl import DPOTrainer, GRPOTrainer, KTOTrainer, RewardTrainer, SFTTrainer
from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference
from trl.trainer.reward_trainer import DataCollatorForPreference
from trl.trainer.utils import RepeatSampler

from svdtune.errors import SvdtuneError, SvdtuneWarning
from svdtune.methods.first_use import forget_reference
from svdtune.training.trainer import RunTrainer

# Logits of a batch above which they are formed in chunks on a CPU too: 1 GiB in float32. Below it a
# CPU is faster with all of them at once.
_WHOLE_LOGITS = 1 << 28


def _as_it_is(self: Any, dataset: Any, *args: Any, **kwargs: Any) -> Any:
    """In place of TRL's tokenization, for rows that are encoded."""
    return dataset


class TaskTrainer(RunTrainer):
    """What all of TRL's trainers have in common here; mixed with one of them.

    Args:
        train_dataset: rows, encoded. TRL looks at the first; what Trainer's loader takes rows from
            is `train_dataset` as it is given.
        eval_dataset: likewise, or None.
        **kwargs: of `RunTrainer` and TRL's trainer.
    """

    def __init__(self, *, train_dataset: Any, eval_dataset: Any = None, **kwargs: Any):
        model = kwargs["model"]
        trained = {name: p.data for name, p in model.named_parameters() if p.requires_grad}
        first = [dict(train_dataset[0])]
        with warnings.catch_warnings():
            # What TRL will do without in its next version is for us to follow, not for the user.
            warnings.filterwarnings("ignore", "`(use_liger_kernel|label_smoothing_factor)", FutureWarning)
            warnings.filterwarnings("ignore", "what the adapter trains was rounded", SvdtuneWarning)
            super().__init__(
                train_dataset=Dataset.from_list(first),
                eval_dataset=None if not eval_dataset else Dataset.from_list(first),
                **kwargs,
            )
        self.train_dataset, self.eval_dataset = train_dataset, eval_dataset
        # TRL rounds what is trained on a quantized base to bfloat16. Adapters of this project undo
        # it by themselves; others, and a reward model's head, are not to lose small steps either.
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and parameter.dtype != trained[name].dtype:
                parameter.data = trained[name]

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Trainer's; TRL's would encode the rows again."""
        return super(_of_trl(type(self)), self).evaluate(eval_dataset, *args, **kwargs)  # type: ignore[misc]

    def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Trainer's, after which a batch counts in TRL's metrics as often as it has rows: TRL takes
        the mean of the batches, of which the last may be short."""
        metrics: dict[str, list[float]] = getattr(self, "_metrics", {}).get("eval", {})
        before = {name: len(values) for name, values in metrics.items()}
        rows = len(inputs) if isinstance(inputs, list) else find_batch_size(inputs) or 1
        found = super().prediction_step(model, inputs, *args, **kwargs)
        for name, values in metrics.items():
            values.extend(values[before.get(name, 0) :] * (rows - 1))
        return found

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's metrics too, but for its count of tokens, which starts anew on resuming."""
        for metrics in getattr(self, "_metrics", {}).values():
            metrics.pop("num_tokens", None)
        super().log(logs, start_time)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """None: the adapter's card is written with the adapter."""

    def _send_telemetry(self) -> None:
        """Nothing is sent."""


class SupervisedTrainer(TaskTrainer, SFTTrainer):
    """SFT on rows with `input_ids` and `labels`, with TRL's fused output head."""

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The mean negative log-likelihood of all labels of a step, as TRL takes it, without the
        metrics that would wait for the device."""
        args: Any = self.args
        if return_outputs or args.loss_type != "nll" or self.aux_loss_enabled:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self.label_smoother is not None or not self._in_chunks(inputs["input_ids"]):
            return super(SFTTrainer, self).compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        outputs = model(**{"use_cache": False, **inputs}, fused_lm_head=True)
        count = outputs.label_mask.sum() if num_items_in_batch is None else num_items_in_batch
        loss = -outputs.log_probs.sum() / torch.as_tensor(count).clamp(min=1)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # which data parallelism divides it by
        return loss

    def _in_chunks(self, input_ids: Tensor) -> bool:
        model: Any = self.model
        vocabulary = int(model.config.get_text_config().vocab_size)
        return input_ids.device.type != "cpu" or input_ids.numel() * vocabulary > _WHOLE_LOGITS


class ReferredTrainer(TaskTrainer):
    """What trainers with a reference have in common: it is the base, the model without its adapter.

    Given a model with an adapter, TRL would put a copy of it on as the reference; given an
    adapter's configuration, it takes the base. So it is given both.

    Attributes:
        copies: whether a model without an adapter is compared with a copy of its start.
    """

    copies = True

    def __init__(self, *, model: Any, **kwargs: Any):
        if not isinstance(model, PeftModel):
            super().__init__(model=model, **({"ref_model": deepcopy(model)} if self.copies else {}), **kwargs)
            return
        with patch.object(sys.modules[_of_trl(type(self)).__module__], "get_peft_model", lambda *_, **__: model):
            config = model.peft_config[model.active_adapter]
            super().__init__(model=model.get_base_model(), peft_config=config, **kwargs)
        forget_reference(model.get_base_model())  # the run has said it

    _prepare_dataset = _as_it_is


class PreferenceTrainer(ReferredTrainer, DPOTrainer):
    """DPO on rows with `prompt_ids`, `chosen_ids` and `rejected_ids`."""


class LabelTrainer(ReferredTrainer, KTOTrainer):
    """KTO on rows with `prompt_ids`, `completion_ids` and `label`."""

    def __init__(self, *, args: Any, processing_class: Any, data_collator: Any = None, **kwargs: Any):
        collator = LabelCollator(
            processing_class.pad_token_id,
            pad_to_multiple_of=args.pad_to_multiple_of,
            mismatched=args.loss_type != "apo_zero_unpaired",
        )
        super().__init__(args=args, processing_class=processing_class, data_collator=collator, **kwargs)


class RewardModelTrainer(TaskTrainer, RewardTrainer):
    """A reward model's head and adapter on rows with `prompt_ids`, `chosen_ids` and
    `rejected_ids`."""

    _prepare_dataset = _as_it_is

    def __init__(self, *, args: Any, processing_class: Any, data_collator: Any = None, **kwargs: Any):
        collator = RewardCollator(processing_class.pad_token_id, pad_to_multiple_of=args.pad_to_multiple_of)
        super().__init__(args=args, processing_class=processing_class, data_collator=collator, **kwargs)


class RolloutTrainer(ReferredTrainer, GRPOTrainer):
    """GRPO on rows with `prompt`, and the columns that rewards look at; the model answers."""

    copies = False

    def __init__(self, *, encode: Callable[[Any], list[int]], data_collator: Any = None, **kwargs: Any):
        self._encode = encode
        super().__init__(**kwargs)

    def _get_train_sampler(self, dataset: Any = None) -> "PromptSampler":
        args: Any = self.args
        return PromptSampler(
            self.train_dataset if dataset is None else dataset,
            mini_repeat_count=self.num_generations,
            batch_size=args.generation_batch_size // self.num_generations,
            repeat_count=self.num_iterations * args.steps_per_generation,
            seed=args.seed,
        )

    def _tokenize_prompts(self, prompts: list[Any]) -> tuple[list[list[int]], None, dict[str, Any]]:
        return [self._encode(prompt) for prompt in prompts], None, {}

    def _prepare_inputs(self, inputs: Any) -> dict[str, Any]:
        """TRL's: prompts with answers to them, and what those are worth."""
        found: dict[str, Any] = super(RunTrainer, self)._prepare_inputs(inputs)
        if self.model is not None and self.model.training:
            self._tokens = self._tokens + found["prompt_mask"].sum() + found["completion_mask"].sum()
        return found

    def count(self, inputs: Any) -> None:
        """Nothing yet: there is no answer to count."""


class PromptSampler(RepeatSampler):
    """TRL's, whose order depends on the epoch and not on how many were drawn before it in this
    process, so that a resumed run sees the prompts that it would have seen."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """The epoch that is drawn next; Accelerate says it."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self.generator.manual_seed(self.seed + self.epoch)
        found: Iterator[int] = super().__iter__()
        return found


@dataclass
class LabelCollator(DataCollatorForUnpairedPreference):
    """TRL's, which also gives each prompt the answer of the row before it in the batch, from which
    KTO estimates how far the model has moved; TRL pairs them once, before rows are shuffled.
    """

    mismatched: bool = True

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Tensors of a batch, as TRL names them."""
        rows = [dict(row) for row in examples]
        if self.mismatched:
            for row, before in zip(rows, [rows[-1], *rows[:-1]], strict=True):
                row["KL_completion_ids"] = before["completion_ids"]
        found: dict[str, Any] = super().torch_call(rows)
        return found


@dataclass
class RewardCollator(DataCollatorForPreference):
    """TRL's, on answers with their prompts before them."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Tensors of a batch, the chosen ones first."""
        whole = [{name: row["prompt_ids"] + row[name] for name in ("chosen_ids", "rejected_ids")} for row in examples]
        found: dict[str, Any] = super().torch_call(whole)
        return found


TRAINERS: dict[str, type[RunTrainer]] = {
    "sft": SupervisedTrainer,
    "dpo": PreferenceTrainer,
    "kto": LabelTrainer,
    "reward": RewardModelTrainer,
    "grpo": RolloutTrainer,
}


def make_trainer(task: str, *, model: Any, **kwargs: Any) -> RunTrainer:
    """The trainer of a task.

    An adapted output head rules out the fused one, which reads the head's weight alone; such a
    model takes Trainer's own loss in SFT.

    Raises:
        SvdtuneError: if the trainer refuses its settings or the model.
    """
    cls = TRAINERS[task]
    if issubclass(cls, SupervisedTrainer) and isinstance(model.get_output_embeddings(), BaseTunerLayer):
        cls = RunTrainer
    try:
        return cls(model=model, **kwargs)
    except (ValueError, NotImplementedError) as error:
        raise SvdtuneError(f"TRL's trainer for training.task: {task} refuses the run: {error}") from error


def _of_trl(cls: type[TaskTrainer]) -> type[Trainer]:
    """TRL's trainer among a trainer's bases."""
    return next(base for base in cls.__mro__ if base.__module__.startswith("trl."))
