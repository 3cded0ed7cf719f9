"""Run folders of version 0.1 whose recipe says layout: residual: resumed, merged and analyzed as
delta, the same function."""

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from test_run import StopAtStep5, log_of, timeless
from typer.testing import CliRunner

from svdtune.cli import app
from svdtune.errors import SvdtuneError
from svdtune.export.source import find_source, open_source
from svdtune.training import Interrupted, load_recipe, train
from svdtune.training import run as run_module
from svdtune.training.checkpoints import seal
from svdtune.training.folder import read_run

SAYS = r"layout='residual', which svdtune 0\.1 wrote, is read as layout='delta'"
RECIPE = """
model: {folder}
method: {{name: sorsa, r: 4, layout: {layout}, target_modules: [q_proj, v_proj]}}
data: {{train: {{source: arithmetic, limit: 24}}, prompt: question, completion: solution, max_length: 256}}
training: {{max_steps: 8, batch_size: 2, learning_rate: 1.0e-2, logging_steps: 1, save_steps: 3}}
output: {{dir: {run}}}
"""


def written(folder: Path, layout: str, tiny_folder: Path, run: Path) -> Path:
    path = folder / f"{layout}.yaml"
    path.write_text(RECIPE.format(folder=tiny_folder, layout=layout, run=run))
    return path


def made_residual(run: Path) -> None:
    """Put 0.1's word for its layout into a run folder: its tensors were these."""
    recipe = run / "recipe.yaml"
    assert "layout: delta" in recipe.read_text()
    recipe.write_text(recipe.read_text().replace("layout: delta", "layout: residual"))
    for config in run.glob("*/adapter_config.json"):
        config.write_text(json.dumps(json.loads(config.read_text()) | {"layout": "residual"}))
    for checkpoint in run.glob("checkpoint-*"):
        seal(checkpoint)


@pytest.fixture
def stopped(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of 0.1 that was stopped after five of eight steps."""
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "StopOnInterrupt", StopAtStep5)
        with pytest.raises(Interrupted):
            train(load_recipe(written(tmp_path, "delta", tiny_folder, tmp_path / "run")))
    made_residual(tmp_path / "run")
    return tmp_path / "run"


def svdtune(*words: Any) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


@contextmanager
def nothing_said() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


def test_it_resumes_to_the_same_losses_with_the_recipe_of_0_1(stopped: Path, tiny_folder: Path, tmp_path: Path) -> None:
    whole = train(load_recipe(written(tmp_path, "delta", tiny_folder, tmp_path / "whole"))).folder
    recipe = written(tmp_path, "residual", tiny_folder, stopped)
    with pytest.warns(UserWarning, match=SAYS) as said:
        result = svdtune("train", recipe, "--resume")
    assert result.exit_code == 0, result.output
    assert sum("layout='residual'" in str(warning.message) for warning in said) == 1
    assert timeless(log_of(stopped)) == timeless(log_of(whole))
    one, other = ((f / "adapter" / "adapter_model.safetensors").read_bytes() for f in (whole, stopped))
    assert one == other


def test_it_resumes_with_the_recipe_of_today(stopped: Path, tiny_folder: Path, tmp_path: Path) -> None:
    recipe = written(tmp_path, "delta", tiny_folder, stopped)
    assert read_run(stopped) == load_recipe(recipe)
    result = svdtune("train", recipe, "--resume")
    assert result.exit_code == 0, result.output
    assert len(log_of(stopped)) == 8


def test_a_new_run_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    recipe = written(tmp_path, "residual", tiny_folder, tmp_path / "run")
    with pytest.raises(SvdtuneError, match=r"(?s)has one problem:.*layout='residual' changed .*layout='delta'"):
        load_recipe(recipe)
    result = svdtune("train", recipe)
    assert result.exit_code == 2
    assert "layout='residual' changed the base model's weights" in result.stderr
    assert not (tmp_path / "run").exists()


def test_a_finished_one_is_merged_exported_analyzed_and_reported(tiny_folder: Path, tmp_path: Path) -> None:
    run = train(load_recipe(written(tmp_path, "delta", tiny_folder, tmp_path / "run"))).folder
    tokens = torch.tensor([[5, 60, 7, 200]])
    with torch.no_grad():
        want = open_source(find_source(run)).model(tokens).logits
    assert svdtune("analyze", run).exit_code == 0
    found = json.loads((run / "analysis" / "after.json").read_text())
    made_residual(run)
    with pytest.warns(UserWarning, match=SAYS):
        model = open_source(find_source(run)).model
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, want)
    for words in (
        ("merge", run, "--output", tmp_path / "merged"),
        ("export", run, "--to", "lora", "--output", tmp_path / "lora"),
        ("analyze", run),
    ):
        with pytest.warns(UserWarning, match=SAYS):
            result = svdtune(*words)
        assert result.exit_code == 0, result.output
    assert json.loads((run / "analysis" / "after.json").read_text()) == found
    with nothing_said():
        result = svdtune("report", run)
    assert result.exit_code == 0, result.output
