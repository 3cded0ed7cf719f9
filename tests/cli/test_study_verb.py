"""`svdtune study` on the command line: names that would mix results, and places that cannot be written."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from svdtune.cli import app


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            ["a/one.yaml", "b/one.yaml"],
            "two study files are called one, and their results would mix; rename one of them",
        ),
        (["runs.yaml"], "runs is what a folder beside the results is called; name the study otherwise"),
        (["none.yaml"], "there is no study file none.yaml"),
    ],
)
def test_names(files: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["study", *files])
    assert result.exit_code == 2
    assert message in result.stderr


def test_a_dry_run_that_cannot_keep_what_it_fitted(tiny_folder: Path, tmp_path: Path) -> None:
    data = "{train: arithmetic, prompt: question, completion: solution, answer: answer}"
    (tmp_path / "recipe.yaml").write_text(
        f"model: {tiny_folder}\nmethod: {{name: lora}}\ndata: {data}\ntraining: {{learning_rate: 1e-3}}\n"
        "evaluation: {data: [svamp]}\n"
    )
    (tmp_path / "one.yaml").write_text(
        "title: One\ntasks: {a: recipe.yaml}\nbudgets: [3k]\nseeds: [1]\n"
        "arms: {lora: {method: {name: lora, target_modules: all-linear}}}\n"
    )
    words = ["study", str(tmp_path / "one.yaml"), "--dry-run", "--output"]
    result = CliRunner().invoke(app, [*words, str(tmp_path / "recipe.yaml")])
    assert result.exit_code == 2
    assert "fits.json: " in result.stderr
    assert "; name another output" in result.stderr
    result = CliRunner().invoke(app, [*words, str(tmp_path / "out")])
    assert result.exit_code == 0, result.stderr
    assert (
        "a · lora at 3,000 parameters: name lora, target_modules all-linear, r 3, lora_alpha 6; 0 + 1 runs"
        in result.stdout
    )
