"""The report without a browser: the headline, the comparisons, the files of the figures, and the
page's size."""

import json
from pathlib import Path

import pytest
from made_runs import make_run
from typer.testing import CliRunner

from svdtune.analysis import comparisons, read_facts
from svdtune.cli import app
from svdtune.names import depth_of
from svdtune.reports import all_numbers, figures, gather, render, write_figures
from svdtune.reports.figures import draw, save
from svdtune.reports.numbers import Lines, Series


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    methods = {
        "sorsa": {"name": "sorsa", "r": 8},
        "small": {"name": "sara", "threshold": 0.01, "layers_to_transform": [0, 1]},
        "large": {"name": "sara", "threshold": 0.02, "layers_to_transform": [2, 3]},
        "lora": {"name": "lora", "r": 8, "lora_alpha": 16},
        "pissa": {"name": "lora", "r": 8, "lora_alpha": 8, "init_lora_weights": "pissa"},
        "one": {"name": "mosara", "threshold": 0.5, "num_heads": 1},
        "five": {"name": "mosara", "threshold": 0.5, "num_heads": 5},
    }
    return [make_run(tmp_path / name, m, depth=2, kinds=2, seed=i) for i, (name, m) in enumerate(methods.items())]


def test_the_comparisons_of_the_paper(runs: list[Path]) -> None:
    found = comparisons([read_facts(run) for run in runs])
    assert list(dict.fromkeys(one["by"] for one in found)) == ["parameters", "threshold", "heads", "layers", "scale"]
    assert found[0]["score"] == "average of sets (strict)"
    by = {one["by"]: {p["run"]: p["label"] for p in one["points"]} for one in found}
    assert len(by["parameters"]) == 7
    assert by["threshold"] == {"small": "0.01", "large": "0.02", "one": "0.5", "five": "0.5"}
    assert by["heads"] == {"one": "1", "five": "5"}
    assert by["layers"] == {"small": "0–1", "large": "2–3"}
    assert by["scale"] == {"lora": "2", "pissa": "1"}
    assert not comparisons([read_facts(runs[0])])


def test_the_headline_has_the_best_run_and_says_whether_the_next_is_apart(runs: list[Path]) -> None:
    facts = [read_facts(run) for run in runs]
    label = "average of sets (strict)"
    best, second = sorted(facts, key=lambda run: -run["scores"][label]["value"])[:2]
    text = gather(facts)["headline"]
    assert text.startswith(f"{best['name']} (")
    assert f"{best['scores'][label]['value']:.1%} on {label}" in text
    assert f"next is {second['name']}" in text
    assert ("overlap" in text) == (best["scores"][label]["low"] <= second["scores"][label]["high"])


@pytest.mark.slow
def test_figures_come_out_identical_and_hold_the_files_numbers(tmp_path: Path) -> None:
    run = make_run(tmp_path / "sorsa", {"name": "sorsa", "r": 8}, depth=1, kinds=1)
    data = gather([read_facts(run)])
    written = write_figures(data, tmp_path / "a")
    assert len(written) == 2 * len(list(all_numbers(data)))
    numbers = {each.name: each for each in all_numbers(gather([read_facts(run)]))}
    for name in ("loss", "moved-angle-sorsa"):
        save(draw(numbers[name]), tmp_path / "again.svg")
        assert (tmp_path / "again.svg").read_bytes() == (tmp_path / "a" / f"{name}.svg").read_bytes()
    log = read_facts(run)["log"]
    rows = (tmp_path / "a" / "loss.csv").read_text(encoding="utf-8").splitlines()
    assert rows[1] == f"sorsa,{log[0]['step']},{log[0]['loss']!r},,"
    assert len(rows) == 1 + len(log)


def test_figures_by_name_are_matplotlib_figures(runs: list[Path]) -> None:
    data = gather([read_facts(run) for run in runs[1:3]])
    data["runs"] = [{**run, "before": None, "after": None} for run in data["runs"]]
    drawn = figures(data)
    assert drawn["loss"].axes[0].get_ylabel() == "training loss"
    assert [text.get_text() for text in drawn["loss"].axes[0].get_legend().get_texts()] == ["small", "large"]


def test_what_is_counted_has_whole_ticks_and_no_title_names_a_figure_of_a_paper(runs: list[Path]) -> None:
    steps = Lines("loss", "Training loss", "step", "loss", [Series("run", [1, 2, 3], [0.5, 0.4, 0.35])])
    axes = draw(steps).axes[0]
    assert [tick for tick in axes.get_xticks() if tick != int(tick)] == []
    assert [tick for tick in axes.get_yticks() if tick != int(tick)] != []
    assert [one.title for one in all_numbers(gather([read_facts(run) for run in runs])) if "Figure" in one.title] == []


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    for part in ("a", "b"):
        make_run(tmp_path / part / "run", {"name": "sorsa", "r": 8}, depth=1, kinds=1)
    data = gather([read_facts(tmp_path / part / "run") for part in ("a", "b")])
    assert [run["name"] for run in data["runs"]] == [str(tmp_path / part / "run") for part in ("a", "b")]


def test_a_model_of_32_layers_stays_below_5_mb(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", {"name": "sorsa", "r": 128}, depth=32, samples=20)
    assert len(render(gather([read_facts(run)])).encode()) < 5e6


def test_the_verb_names_what_is_missing_and_where_the_page_is(runs: list[Path], tmp_path: Path) -> None:
    (runs[0] / "analysis" / "after.json").unlink()
    (runs[0] / "analysis" / "before.json").unlink()
    words = ["report", str(runs[0]), "--figures", str(tmp_path / "figures")]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert "sorsa lacks the trained change: svdtune analyze RUN" in result.stdout
    assert (runs[0] / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert "files in" in result.stdout
    assert (tmp_path / "figures" / "loss.svg").is_file()


def test_the_model_card_has_the_key_figure_and_table(runs: list[Path]) -> None:
    for run in (runs[0], runs[-1]):
        (run / "adapter").mkdir()
        assert CliRunner().invoke(app, ["report", str(run)]).exit_code == 0
        card = (run / "adapter" / "README.md").read_text(encoding="utf-8")
        assert "## What changed" in card
        assert "](analysis.svg)" in card
        assert (run / "adapter" / "analysis.svg").is_file()
    changed = [layer for name, layer in read_facts(runs[0])["after"]["layers"].items() if name.endswith("q_proj")]
    mean = sum(layer["relative_change"] for layer in changed) / 2
    assert f"| self_attn.q_proj | 2 | {mean:.3%} |" in (runs[0] / "adapter" / "README.md").read_text(encoding="utf-8")
    assert "| math | self_attn.k_proj | 0.750 |" in card


def test_the_page_refers_to_nothing_outside(runs: list[Path]) -> None:
    text = render(gather([read_facts(runs[0])]))
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "").replace("http-equiv", "")


def test_spectra_of_runs_on_different_layers_are_drawn_together(tmp_path: Path) -> None:
    made = [
        make_run(tmp_path / name, {"name": "sara", "threshold": 0.01}, depth=4, kinds=1) for name in ("low", "high")
    ]
    for run, depths in zip(made, ({0, 1}, {2, 3}), strict=True):
        path = run / "analysis" / "before.json"
        before = json.loads(path.read_text("utf-8"))
        before["layers"] = {name: layer for name, layer in before["layers"].items() if depth_of(name) in depths}
        path.write_text(json.dumps(before), encoding="utf-8")
    data = gather([read_facts(run) for run in made])
    (ranks,) = (numbers for numbers in all_numbers(data) if numbers.name.startswith("ranks-"))
    assert [list(one.x) for one in ranks.series] == [[0, 1, 2, 3]] * len(ranks.series)
