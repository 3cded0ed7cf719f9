"""AdaLoRA in Trainer: its ranks are given up as it trains, and a checkpoint keeps what the next
step goes by.

PEFT saves the ranks that are left alone, which is right for a result. A checkpoint needs all of
them, as the optimizer has them, and the importance that the ranks were found to have so far.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import AdaLoraConfig, AdaLoraModel
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

STATE = "adalora.safetensors"
_SCORES = ("ipt", "exp_avg_ipt", "exp_avg_unc")


class AllocateRanks(TrainerCallback):
    """Lets AdaLoRA redistribute its ranks after each optimizer step, which Trainer does not do by
    itself."""

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        tuner, config = _adalora(model)
        # PEFT cannot choose none to give up
        if tuner is not None and config.target_r < config.init_r:
            tuner.update_and_allocate(state.global_step)


@contextmanager
def all_ranks(model: Any) -> Iterator[None]:
    """A while in which saving keeps the ranks that were given up too; of other methods, nothing
    changes."""
    _, config = _adalora(model)
    if config is None:
        yield
        return
    kept, config.rank_pattern = config.rank_pattern, None
    try:
        yield
    finally:
        config.rank_pattern = kept


def save_state(model: Any, checkpoint: Path) -> None:
    """Write what AdaLoRA's next step goes by into a checkpoint; of other methods, nothing."""
    tuner, config = _adalora(model)
    if tuner is None:
        return
    scores = {f"{part}/{name}": t for part in _SCORES for name, t in getattr(tuner.rankallocator, part).items()}
    masks = {f"kept/{name}": torch.tensor(mask) for name, mask in (config.rank_pattern or {}).items()}
    save_file({name: tensor.contiguous() for name, tensor in (scores | masks).items()}, checkpoint / STATE)


def load_state(model: Any, checkpoint: Path) -> None:
    """Take up again what `save_state` wrote."""
    tuner, config = _adalora(model)
    if tuner is None or not (checkpoint / STATE).is_file():
        return
    saved = load_file(checkpoint / STATE, device=str(next(tuner.parameters()).device))
    for part in _SCORES:
        found = {name.removeprefix(f"{part}/"): t for name, t in saved.items() if name.startswith(f"{part}/")}
        setattr(tuner.rankallocator, part, found)
    masks = {name.removeprefix("kept/"): t.tolist() for name, t in saved.items() if name.startswith("kept/")}
    config.rank_pattern = masks or None


def _adalora(model: Any) -> tuple[AdaLoraModel | None, AdaLoraConfig | None]:
    """The tuner and the configuration that is trained, where the model has AdaLoRA."""
    tuner = getattr(getattr(model, "module", model), "base_model", None)
    if not isinstance(tuner, AdaLoraModel):
        return None, None
    return tuner, tuner.peft_config[tuner.trainable_adapter_name]
