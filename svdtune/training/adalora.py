"""AdaLoRA in Trainer: its ranks are given up as it trains, and a checkpoint keeps what the next
step goes by.

PEFT saves the ranks that are left alone, which is right for a result. A checkpoint needs all of
them, as the optimizer has them, and the importance that the ranks were found to have so far.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

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
        found = _adalora(model)
        # PEFT cannot choose none to give up
        if found is not None and found.config.target_r < found.config.init_r:
            found.tuner.update_and_allocate(state.global_step)


@contextmanager
def all_ranks(model: Any) -> Iterator[None]:
    """A while in which saving keeps the ranks that were given up too; of other methods, nothing
    changes."""
    found = _adalora(model)
    if found is None:
        yield
        return
    config = found.config
    kept, config.rank_pattern = config.rank_pattern, None
    try:
        yield
    finally:
        config.rank_pattern = kept


def save_state(model: Any, checkpoint: Path) -> None:
    """Write what AdaLoRA's next step goes by into a checkpoint; of other methods, nothing."""
    found = _adalora(model)
    if found is None:
        return
    tuner, config = found
    scores = {f"{part}/{name}": t for part in _SCORES for name, t in getattr(tuner.rankallocator, part).items()}
    masks = {f"kept/{name}": torch.tensor(mask) for name, mask in (config.rank_pattern or {}).items()}
    save_file({name: tensor.contiguous() for name, tensor in (scores | masks).items()}, checkpoint / STATE)


def load_state(model: Any, checkpoint: Path) -> None:
    """Take up again what `save_state` wrote."""
    found = _adalora(model)
    if found is None or not (checkpoint / STATE).is_file():
        return
    tuner, config = found
    saved = load_file(checkpoint / STATE, device=str(next(tuner.parameters()).device))
    for part in _SCORES:
        scores = {name.removeprefix(f"{part}/"): t for name, t in saved.items() if name.startswith(f"{part}/")}
        setattr(tuner.rankallocator, part, scores)
    masks = {name.removeprefix("kept/"): t.tolist() for name, t in saved.items() if name.startswith("kept/")}
    config.rank_pattern = masks or None


class _AdaLora(NamedTuple):
    tuner: AdaLoraModel
    config: AdaLoraConfig


def _adalora(model: Any) -> _AdaLora | None:
    """The tuner and the configuration that is trained, where the model has AdaLoRA."""
    tuner = getattr(getattr(model, "module", model), "base_model", None)
    if not isinstance(tuner, AdaLoraModel):
        return None
    config = tuner.peft_config[tuner.trainable_adapter_name]
    assert isinstance(config, AdaLoraConfig)
    return _AdaLora(tuner, config)
