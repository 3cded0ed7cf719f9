"""Batches that are filled up with empty rows, and runs in which that would make a mean of
nothing; means over batches of which the last is short."""

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.data import BatchSampler, SequentialSampler
from transformers import Trainer

from svdtune.training import tasks, trainer
from svdtune.training.collators import FilledBatches


def test_batches_are_filled_up_to_whole_ones_and_to_one_for_each_process() -> None:
    batches = BatchSampler(SequentialSampler(range(5)), batch_size=2, drop_last=False)
    assert len(FilledBatches(batches, processes=2, empty=9)) == 4
    assert list(FilledBatches(batches, processes=2, empty=9)) == [[0, 1], [2, 3], [4, 9], [9, 9]]


@pytest.mark.parametrize(("smoothing", "told", "filled"), [(0.0, True, True), (0.1, True, False), (0.0, False, False)])
def test_no_empty_rows_where_a_batch_takes_its_own_mean(
    monkeypatch: pytest.MonkeyPatch, smoothing: float, told: bool, filled: bool
) -> None:
    seen: list[str] = []
    monkeypatch.setattr(Trainer, "get_train_dataloader", lambda _: "loader")
    monkeypatch.setattr(trainer, "fill_up", seen.append)
    run = object.__new__(trainer.RunTrainer)
    run.args = SimpleNamespace(label_smoothing_factor=smoothing, auto_find_batch_size=False, train_batch_size=2)
    run.model_accepts_loss_kwargs = told
    assert run.get_train_dataloader() == "loader"
    assert seen == ["loader"] * filled


def test_what_an_evaluation_measures_counts_rows_and_not_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    def step(self: Any, _: Any, inputs: dict[str, torch.Tensor]) -> None:
        self._metrics["eval"]["accuracy"].append(float(inputs["right"].mean()))

    monkeypatch.setattr(trainer.RunTrainer, "prediction_step", step)
    run = object.__new__(tasks.RewardModelTrainer)
    run._metrics = {"eval": defaultdict(list)}
    for right in ([1.0, 1.0, 1.0], [1.0, 0.0, 1.0], [0.0]):
        run.prediction_step(None, {"right": torch.tensor(right)})
    measured = run._metrics["eval"]["accuracy"]
    assert sum(measured) / len(measured) == pytest.approx(5 / 7)
