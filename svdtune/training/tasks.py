"""TRL's trainers as this project runs them: sealed checkpoints, exact resume, rows side by side,
and no wait for the device at any step.

TRL is imported here and nowhere else, and this module only where a run starts.
"""

from typing import Any

import torch
from datasets import Dataset
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from trl import SFTTrainer

from svdtune.training.trainer import RunTrainer

# Logits of a batch above which they are formed in chunks on a CPU too: 1 GiB in float32. Below it a
# CPU is faster with all of them at once.
_WHOLE_LOGITS = 1 << 28


class SupervisedTrainer(RunTrainer, SFTTrainer):
    """SFT on rows that are encoded already, with TRL's fused output head.

    Args:
        rows: what is trained on, with `input_ids` and `labels`. TRL looks at a few of them; what
            Trainer's loader takes rows from is `train_dataset`.
        **kwargs: of `RunTrainer` and `trl.SFTTrainer`.
    """

    def __init__(self, *, train_dataset: Any, eval_dataset: Any = None, **kwargs: Any):
        trained = {name: p.data for name, p in kwargs["model"].named_parameters() if p.requires_grad}
        first = [dict(train_dataset[0])]
        super().__init__(
            train_dataset=Dataset.from_list(first),
            eval_dataset=None if eval_dataset is None else Dataset.from_list(first),
            **kwargs,
        )
        self.train_dataset, self.eval_dataset = train_dataset, eval_dataset
        # TRL rounds what is trained on a quantized base to bfloat16, in which SORSA's and SARA's
        # small changes and the orthonormality of the factors are lost.
        for name, parameter in kwargs["model"].named_parameters():
            if parameter.requires_grad and parameter.dtype != trained[name].dtype:
                parameter.data = trained[name]

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

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Trainer's; TRL's would encode the rows again."""
        return super(SFTTrainer, self).evaluate(eval_dataset, *args, **kwargs)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """None: the adapter's card is written with the adapter."""

    def _send_telemetry(self) -> None:
        """Nothing is sent."""


TRAINERS: dict[str, type[RunTrainer]] = {"sft": SupervisedTrainer}


def make_trainer(task: str, *, model: Any, **kwargs: Any) -> RunTrainer:
    """The trainer of a task.

    An adapted output head rules out the fused one, which reads the head's weight alone; such a
    model takes Trainer's own loss.

    Args:
        task: as `training.task` of a recipe.
        model: with or without an adapter.
        **kwargs: of the trainer.
    """
    cls = TRAINERS[task]
    if issubclass(cls, SupervisedTrainer) and isinstance(model.get_output_embeddings(), BaseTunerLayer):
        cls = RunTrainer
    return cls(model=model, **kwargs)
