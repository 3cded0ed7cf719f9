"""`svdtune demo --quick` from end to end on the tiny model: every method trained, scored, and
merged where it can be."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from svdtune.cli import app, demo
from svdtune.models import load


def svdtune(*words: str | Path) -> Result:
    return CliRunner().invoke(app, ["demo", *map(str, words)], terminal_width=200)


@pytest.fixture
def tiny_demo(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Result]:
    monkeypatch.setattr(demo, "QUICK", demo.Size(steps=2, rows=2, items=3, max_new_tokens=4))
    sorsa, *others = demo.METHODS
    # the tiny model's layers have no rank 32
    small = replace(sorsa, options=sorsa.options | {"r": 4})
    monkeypatch.setattr(demo, "METHODS", (small, *others))
    output = tmp_path / "demo"
    return output, svdtune("--quick", "--model", tiny_folder, "--output", output)


def test_trains_scores_and_merges_all_three(tiny_demo: tuple[Path, Result], tiny_folder: Path) -> None:
    output, result = tiny_demo
    assert result.exit_code == 0, result.output
    results = json.loads((output / "results.json").read_text())
    assert results["quick"] is True
    assert [row["method"] for row in results["rows"]] == ["SORSA", "SARA", "Mo-SARA"]
    base = load(tiny_folder).model.num_parameters()
    for row in results["rows"]:
        run = output / row["settings"]["name"]
        weights = run / "adapter" / "adapter_model.safetensors"
        assert row["adapter_bytes"] == weights.stat().st_size
        assert 0 < row["trained_parameters"] < row["total_parameters"]
        assert row["total_parameters"] >= base
        score = json.loads((run / "evaluations" / "arithmetic-number" / "result.json").read_text())
        assert (score["n"], score["strict"]["accuracy"]) == (3, row["after"])
        assert row["after_interval"] == [score["strict"]["interval"][end] for end in ("low", "high")]
        assert len((run / "train_log.jsonl").read_text().splitlines()) >= 1
        merges = row["settings"]["name"] != "mosara"
        assert (run / "merged").exists() is merges
        assert row["merged"].startswith("yes" if merges else "no: token-level routing")
        assert row["score_seconds"] > 0
        assert row["merge_seconds"] > 0
    assert 0 < results["base_seconds"] < results["seconds"]
    assert results["expected_seconds"] > 0
    assert "--quick" in result.stdout
    assert not list(output.glob("**/*.partial"))


def test_says_how_long_it_will_take_before_the_first_training(tiny_demo: tuple[Path, Result]) -> None:
    lines = tiny_demo[1].stdout.splitlines()
    assert lines.count("about 1 minute left") == 3  # before each method
    told, first_step = (next(i for i, line in enumerate(lines) if words in line) for words in (" left", "step 1/"))
    assert told < first_step


@pytest.mark.slow
def test_a_second_demo_replaces_the_first_but_nothing_else(
    tiny_demo: tuple[Path, Result], tiny_folder: Path, tmp_path: Path
) -> None:
    output, first = tiny_demo
    assert first.exit_code == 0, first.output
    again = svdtune("--quick", "--model", tiny_folder, "--output", output)
    assert again.exit_code == 0, again.output
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "precious").write_text("kept")
    refused = svdtune("--quick", "--model", tiny_folder, "--output", tmp_path / "other")
    assert refused.exit_code == 2
    assert "not from an earlier demo" in refused.stderr
    assert (tmp_path / "other" / "precious").read_text() == "kept"


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0, "1 minute"), (60, "1 minute"), (61, "2 minutes"), (299, "5 minutes"), (301, "6 minutes")],
)
def test_minutes_are_rounded_up(seconds: float, words: str) -> None:
    assert demo.in_minutes(seconds) == words


def ticks(*seconds: float) -> Iterator[float]:
    """A clock's readings: two for each span of so many seconds."""
    now = 0.0
    for span in seconds:
        yield now
        now += span
        yield now


def test_a_training_step_is_taken_through_every_layer_and_the_second_one_counts(
    tiny_folder: Path, tmp_path: Path
) -> None:
    loaded = load(tiny_folder)
    size = demo.Size(steps=2, rows=3, items=3, max_new_tokens=4)
    recipe = demo.make_recipe(demo.METHODS[1], size, str(tiny_folder), tmp_path)
    seen: list[tuple[int, ...]] = []
    first = loaded.model.model.layers[0]
    first.register_full_backward_hook(lambda _, inputs, outputs: seen.append(tuple(outputs[0].shape)))
    assert demo.step_seconds(loaded, recipe, ticks(7.0, 2.0).__next__) == 2
    assert len(seen) == 2
    assert seen[0][0] == 3
    assert all(parameter.grad is None for parameter in loaded.model.parameters())
