"""`svdtune study` on the command line: names that would mix results, and places that cannot be
written."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from svdtune.cli import app
from svdtune.lab.study import runner


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


@pytest.fixture
def study(tiny_folder: Path, tmp_path: Path) -> Path:
    """A study file beside its recipe."""
    data = "{train: arithmetic, prompt: question, completion: solution, answer: answer}"
    (tmp_path / "recipe.yaml").write_text(
        f"model: {tiny_folder}\nmethod: {{name: lora}}\ndata: {data}\ntraining: {{learning_rate: 1e-3}}\n"
        "evaluation: {data: [svamp]}\n"
    )
    (tmp_path / "one.yaml").write_text(
        "title: One\ntasks: {a: recipe.yaml}\nbudgets: [3k]\nseeds: [1]\n"
        "arms: {lora: {method: {name: lora, target_modules: all-linear}}}\n"
    )
    return tmp_path / "one.yaml"


def test_a_dry_run_that_cannot_keep_what_it_fitted(study: Path) -> None:
    words = ["study", str(study), "--dry-run", "--output"]
    result = CliRunner().invoke(app, [*words, str(study)])
    assert result.exit_code == 2
    assert "fits.json: " in result.stderr
    assert "; name another output" in result.stderr
    result = CliRunner().invoke(app, [*words, str(study.parent / "out")])
    assert result.exit_code == 0, result.stderr
    assert (
        "a · lora at 3,000 parameters: name lora, target_modules all-linear, r 3, lora_alpha 6; 0 + 1 runs"
        in result.stdout
    )


def test_failed_runs_are_counted_at_the_end(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = {
        "key": "0",
        "arm": "lora",
        "task": "a",
        "budget": 3000,
        "phase": "final",
        "learning_rate": 1e-3,
        "method": {},
    }
    runs = [run | {"seed": seed, "status": status} for seed, status in enumerate(("failed", "finished", "diverged"))]

    said = f"{' and so on' * 20}: pip install 'svdtune[study]'"

    def pretend(studies: dict, output: Path, how: object, tell: Callable[[str], None]) -> list[Path]:
        tell(said)
        path = output / "one" / "results.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({"title": "One", "svdtune": "0", "runs": runs}))
        return [path]

    monkeypatch.setattr(runner, "run_studies", pretend)
    result = CliRunner().invoke(app, ["study", str(study), "--output", str(study.parent / "out")])
    assert result.exit_code == 0, result.stderr
    assert f"results: {study.parent / 'out' / 'one' / 'README.md'}" in result.stdout
    assert said in result.stderr, "in one line, brackets and all"
    assert "1 of 3 runs failed; the page says why, and --retry makes them again" in result.stdout
