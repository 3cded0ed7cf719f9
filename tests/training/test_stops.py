"""A run that stops where it must not: what is kept is whole, what goes on ends the same, and the
message says how."""

import errno
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback
from typer.testing import CliRunner, Result

from releases import TRANSFORMERS_4
from svdtune.cli import app
from svdtune.training import check_recipe, run, tasks, trainer
from svdtune.training.checkpoints import latest_checkpoint
from svdtune.training.recipe import dump_recipe


class Killed(BaseException):
    """In the place of SIGKILL, which nothing catches either."""


def killed(*_: object) -> None:
    raise Killed


def write_recipe(model: Path, folder: Path) -> str:
    """A recipe in a folder, and its run beside it."""
    settings: dict[str, Any] = {
        "model": str(model),
        "method": {"name": "sorsa", "r": 2, "dropout": 0.1},
        "data": {"train": {"source": "arithmetic", "limit": 16}, "prompt": "question", "completion": "solution"},
        "training": {"learning_rate": 1e-3, "max_steps": 6, "batch_size": 2, "logging_steps": 1, "save_steps": 2},
        "output": {"dir": str(folder / "run")},
    }
    settings["data"]["max_length"] = 256
    path = folder / "recipe.yaml"
    path.write_text(dump_recipe(check_recipe(settings)))
    return str(path)


@pytest.fixture
def recipe(tiny_folder: Path, tmp_path: Path) -> str:
    return write_recipe(tiny_folder, tmp_path)


def svdtune(*words: str) -> Result:
    return CliRunner().invoke(app, ["train", *words])


def steps(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "train_log.jsonl").read_text().splitlines()]


def weights(folder: Path) -> bytes:
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def whole_run(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run where nothing stops it."""
    folder = tmp_path_factory.mktemp("whole")
    assert svdtune(write_recipe(tiny_folder, folder)).exit_code == 0
    return folder / "run"


@pytest.fixture
def whole(whole_run: Path) -> bytes:
    """Its weights."""
    return weights(whole_run)


@pytest.mark.parametrize("call", [1, 2, 3])
@pytest.mark.parametrize("place", ["before the seal", "after the seal"])
@pytest.mark.family(2)
def test_a_kill_while_a_checkpoint_is_written(
    recipe: str, whole: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int, place: str
) -> None:
    calls, real = [], trainer.seal

    def seal(checkpoint: Path) -> None:
        calls.append(checkpoint)
        if len(calls) == call and place == "before the seal":
            raise Killed
        real(checkpoint)
        if len(calls) == call:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "seal", seal)
        with pytest.raises(Killed):
            svdtune(recipe)
    kept, skipped = latest_checkpoint(tmp_path / "run")
    assert bool(skipped) == (place == "before the seal")
    result = svdtune(recipe, "--resume" if kept else "--overwrite")
    assert result.exit_code == 0, result.output
    assert weights(tmp_path / "run") == whole


@pytest.mark.skipif(TRANSFORMERS_4, reason="resumed after its last step, Trainer 4 takes one more")
def test_a_kill_while_the_result_is_written(
    recipe: str, whole_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(run, "write_summary", killed)
        with pytest.raises(Killed):
            svdtune(recipe)
    assert not (tmp_path / "run" / "training.json").exists()
    result = svdtune(recipe, "--resume")
    assert result.exit_code == 0, result.output
    assert weights(tmp_path / "run") == weights(whole_run)
    assert steps(tmp_path / "run") == [1, 2, 3, 4, 5, 6]
    summaries = [json.loads((folder / "training.json").read_text()) for folder in (whole_run, tmp_path / "run")]
    assert summaries[1]["steps"] == 6
    assert summaries[1]["loss"] == pytest.approx(summaries[0]["loss"], rel=1e-3)


def test_a_damaged_checkpoint_is_skipped_aloud(
    recipe: str, whole: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(run, "write_summary", killed)
        with pytest.raises(Killed):
            svdtune(recipe, "--training.keep_checkpoints", "2")
    damaged = tmp_path / "run" / "checkpoint-6" / "optimizer.pt"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    result = svdtune(recipe, "--resume", "--training.keep_checkpoints", "2")
    assert result.exit_code == 0, result.output
    assert "checkpoint-6 is skipped: its optimizer.pt was altered; going on from checkpoint-4" in " ".join(
        result.stderr.split()
    )
    assert weights(tmp_path / "run") == whole


def test_nothing_whole_to_resume_from(recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "seal", killed)
        with pytest.raises(Killed):
            svdtune(recipe)
    result = svdtune(recipe, "--resume")
    assert result.exit_code == 2
    message = (
        f"there is no checkpoint in {tmp_path / 'run'} to resume from (checkpoint-2 is skipped: it was not written to "
    )
    assert result.stderr.startswith(f"svdtune: {message}its end); start with --overwrite instead of --resume")


@pytest.mark.parametrize("call", [0, 1, 2])
@pytest.mark.family(1)
def test_a_full_disk_is_one_sentence_and_the_run_goes_on(
    recipe: str, whole: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    calls, real = [], os.fsync

    def fsync(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) > 10 * call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        result = svdtune(recipe)
    assert result.exit_code == 2
    assert "Traceback" not in result.output
    assert result.stderr.splitlines()[-1] == (
        f"svdtune: cannot write {tmp_path / 'run'}: the disk is full; free or name another place (output.dir); what has a "
        "checkpoint goes on with --resume"
    )
    kept, _ = latest_checkpoint(tmp_path / "run")
    flags = ["--resume"] if kept else ["--overwrite"] if (tmp_path / "run" / "recipe.yaml").exists() else []
    result = svdtune(recipe, *flags)
    assert result.exit_code == 0, result.output
    assert weights(tmp_path / "run") == whole


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_schedulers_signal_stops_after_the_step_with_a_checkpoint(
    recipe: str, whole: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    class SendAtStep3(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 2:
                os.kill(os.getpid(), number)

    class WithSignal(tasks.SupervisedTrainer):
        def __init__(self, **kwargs: Any):
            super().__init__(**kwargs)
            self.add_callback(SendAtStep3())

    with monkeypatch.context() as patch:
        patch.setitem(tasks.TRAINERS, "sft", WithSignal)
        result = svdtune(recipe)
    assert result.exit_code == 130
    assert "stopped after step 3, with a checkpoint in" in result.stderr
    assert svdtune(recipe, "--resume").exit_code == 0
    assert weights(tmp_path / "run") == whole


def test_two_runs_are_equal_to_the_bit(recipe: str, whole: bytes, tmp_path: Path) -> None:
    torch.manual_seed(1234)  # the recipe's seed decides, not what ran before
    assert svdtune(recipe).exit_code == 0
    assert weights(tmp_path / "run") == whole
