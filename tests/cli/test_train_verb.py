"""`svdtune train` from the command line."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from svdtune.cli import app
from svdtune.training import run as run_module
from svdtune.training.callbacks import StopOnInterrupt
from svdtune.training.recipe import check_recipe, dump_recipe


def svdtune(*words: str) -> Result:
    return CliRunner().invoke(app, ["train", *words])


@pytest.fixture
def recipe(tiny_folder: Path, tmp_path: Path) -> str:
    settings = {
        "model": str(tiny_folder),
        "method": {"name": "lora", "r": 2, "target_modules": ["q_proj"]},
        "data": {"train": {"source": "arithmetic", "limit": 8}, "prompt": "question", "completion": "solution"},
        "training": {"learning_rate": 1e-3, "max_steps": 3, "batch_size": 2, "logging_steps": 1},
        "output": {"dir": str(tmp_path / "run")},
    }
    settings["data"]["max_length"] = 256
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_recipe(check_recipe(settings)))
    return str(path)


def test_overrides_reach_the_run(recipe: str, tmp_path: Path) -> None:
    result = svdtune(recipe, "--training.max_steps", "2", "--method={name: sorsa, r: 3}")
    assert result.exit_code == 0, result.output
    assert "trained 2 steps in" in result.stdout
    summary = json.loads((tmp_path / "run" / "training.json").read_text())
    assert (summary["method"], summary["steps"]) == ("sorsa", 2)


def test_a_wrong_recipe_is_one_message_and_exit_code_2(recipe: str) -> None:
    result = svdtune(recipe, "--training.batch", "4", "--method.rank", "2")
    assert result.exit_code == 2
    assert "has 2 problems:" in result.stderr
    assert "training.batch: unknown setting; did you mean batch_size?" in result.stderr
    assert "Traceback" not in result.output


def test_a_stopped_run_says_how_to_go_on(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class StopAtOnce(StopOnInterrupt):
        stopped = True

        def __init__(self) -> None:
            super().__init__()
            self.stopped = True

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "StopOnInterrupt", StopAtOnce)
        result = svdtune(recipe, "--method.r", "4")
    assert result.exit_code == 130
    assert f"svdtune train {recipe} --method.r 4 --resume" in result.stderr
    result = svdtune(recipe, "--method.r", "4", "--resume")
    assert result.exit_code == 0, result.output
    assert "trained 3 steps" in result.stdout
