"""Running out of memory names the numbers of the recipe and what to set instead; and what the
trainer asks of Transformers' own."""

from pathlib import Path

import pytest
import torch
from transformers import Trainer

from svdtune.errors import SvdtuneError
from svdtune.training import check_recipe, train
from svdtune.training.memory import explain_out_of_memory, out_of_memory_message
from svdtune.training.recipe import Recipe
from svdtune.training.trainer import RunTrainer


def recipe(folder: Path | str = "model", run: Path | str = "run", **training: object) -> Recipe:
    return check_recipe(
        {
            "model": str(folder),
            "method": {"name": "sorsa", "r": 8},
            "data": {
                "train": {"source": "arithmetic", "limit": 8},
                "prompt": "question",
                "completion": "solution",
                "max_length": 256,
            },
            "training": {"learning_rate": 1e-3, "batch_size": 8, "max_steps": 2} | training,
            "output": {"dir": str(run)},
        }
    )


def test_every_setting_that_helps_is_named_with_its_number() -> None:
    assert out_of_memory_message(recipe()).splitlines() == [
        "out of memory at batch_size 8 and rows of up to 256 tokens. What takes less, to be tried in this order:",
        "  --training.batch_size 4 --training.gradient_accumulation 2 (the same rows a step)",
        "  --training.gradient_checkpointing true (the same losses, slower)",
        "  --model.dtype bfloat16 (half the base model's float32)",
        "  --data.max_length 128 --data.overlong drop",
        "  --method.r 4",
    ]


def test_what_is_set_already_is_not_named() -> None:
    message = out_of_memory_message(recipe(batch_size=1, gradient_checkpointing=True))
    assert "batch_size 1 and" in message
    assert "--training" not in message


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
def test_out_of_memory_while_training_is_one_message(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(RunTrainer, "training_step", fail)
    with pytest.raises(SvdtuneError, match=r"^out of memory.* at batch_size 8 .*\n  --training.batch_size 4"):
        train(recipe(tiny_folder, tmp_path / "run"))


def test_other_errors_pass() -> None:
    with pytest.raises(RuntimeError, match="shapes"), explain_out_of_memory(recipe()):
        raise RuntimeError("shapes differ")


@pytest.mark.parametrize("given", [(), ("a wrapped model",)])
def test_a_trainer_whose_optimizer_takes_no_model_is_given_none(monkeypatch: pytest.MonkeyPatch, given: tuple) -> None:
    """As Transformers 4's; 5's takes one, and is given what it gave."""
    monkeypatch.setattr(Trainer, "create_optimizer", lambda self, *model: model)
    trainer = RunTrainer.__new__(RunTrainer)
    trainer.optimizer, trainer.learning_rate_ratios = None, {}
    assert trainer.create_optimizer(*given) == given
