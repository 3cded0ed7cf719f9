"""`--quiet` and `--json` on every verb; no bars and no wrapped lines where there is no terminal."""

import ast
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer
from test_odd_values import leaves
from typer.testing import CliRunner

import svdtune
from svdtune import SorsaConfig, cli
from svdtune.cli import app, outcome
from svdtune.system import open_console, plain, without_bar


class Terminal(io.StringIO):
    """A stream that says it is one."""

    def isatty(self) -> bool:
        return True


RUNS: dict[str, list[str]] = {
    "new": ["MODEL", "ROWS"],
    "recipes list": [],
    "recipes show": ["small"],
    "recipes write": ["small"],
    "plan": ["MODEL"],
    "init": ["MODEL", "--r", "2", "--output", "OUT"],
    "data check": ["ROWS"],
    "data list": [],
    "train": ["RECIPE"],
    "evaluate": ["RUN", "--limit", "1", "--max-new-tokens", "1"],
    "generate": ["RUN", "hi", "--max-new-tokens", "1"],
    "analyze": ["RUN"],
    "merge": ["RUN", "--output", "OUT"],
    "export": ["RUN", "--output", "OUT"],
    "combine": ["RUN", "--output", "OUT"],
    "report": ["RUN"],
    "cache list": [],
    "cache clear": ["--yes"],
    "study new": ["MODEL", "ROWS", "--budget", "3k"],
    "study run": ["small/ranks", "--dry-run"],
}
NOT_TRIED = {"demo", "study run", "chat", "push"}  # minutes; data of its own; a user; a hub


def commands() -> set[str]:
    group: Any = typer.main.get_command(app)
    return {name for verb in cli.verbs() for name, _ in leaves(group.get_command(None, verb), verb)}


def test_every_command_but_a_foreign_program_has_both(tmp_path: Path) -> None:
    assert commands() == {*RUNS, *NOT_TRIED, "with"}
    for name in commands() - {"with"}:
        shown = CliRunner().invoke(app, [*name.split(), "--help"]).stdout
        assert "--json" in shown, name
        assert "--quiet" in shown, name
        assert "--install-completion" not in shown, name
    assert "--install-completion" in CliRunner().invoke(app, ["--help"]).stdout


@pytest.fixture(scope="module")
def places(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    from runs import go

    folder = tmp_path_factory.mktemp("outcome")
    rows = [{"prompt": f"{n}+1", "completion": str(n + 1)} for n in range(8)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "model": str(tiny_folder),
        "method": {"name": "sorsa", "r": 2, "target_modules": ["q_proj"]},
        "data": {"train": str(folder / "rows.jsonl"), "max_length": 64},
        "training": {"max_steps": 1, "batch_size": 2, "learning_rate": 1e-3},
        "evaluation": {"data": "arithmetic"},
        "output": {"dir": str(folder / "run")},
    }
    recipe["evaluation"] |= {"prompt": "question", "answer": "answer"}
    go(json.loads(json.dumps(recipe)))
    (folder / "recipe.yaml").write_text(json.dumps(recipe | {"output": {"dir": str(folder / "other")}}))
    names = {"MODEL": str(tiny_folder), "ROWS": str(folder / "rows.jsonl"), "RUN": str(folder / "run")}
    return names | {"RECIPE": str(folder / "recipe.yaml"), "OUT": str(folder / "out")}


@pytest.mark.parametrize("name", sorted(RUNS.keys() - NOT_TRIED), ids=lambda name: name.replace(" ", "-"))
def test_what_is_found_is_json_alone_on_standard_output(
    name: str, places: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [str(tmp_path / "out") if word == "OUT" else places.get(word, word) for word in RUNS[name]]
    shown = CliRunner().invoke(app, [*name.split(), *words, "--json", "-", "--quiet"])
    assert shown.exit_code == 0, shown.output
    assert json.loads(shown.stdout), shown.stdout
    assert shown.stderr == "", "what is quiet says what went wrong alone"


def test_a_file_is_written_whole_and_the_words_stay(places: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "deep" / "found.json"
    shown = CliRunner().invoke(app, ["data", "check", places["ROWS"], "--json", str(path)])
    assert shown.exit_code == 0, shown.output
    assert f"wrote {path}" in shown.stdout
    assert "8 rows" in shown.stdout
    assert json.loads(path.read_text())[places["ROWS"]]["rows"] == 8


def test_a_status_that_says_something_keeps_its_json(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text("{}\n[]\n")
    shown = CliRunner().invoke(app, ["data", "check", str(tmp_path / "bad.jsonl"), "--json", "-"])
    assert shown.exit_code == 1
    assert json.loads(shown.stdout)


def test_an_error_is_told_in_quiet_too() -> None:
    shown = CliRunner().invoke(app, ["report", "nowhere", "--quiet"])
    assert shown.exit_code == 2
    assert shown.stderr.startswith("svdtune: there is no run nowhere")


def test_what_json_lacks_is_text(tmp_path: Path) -> None:
    assert plain([float("nan"), -float("inf"), 0.5]) == [None, None, 0.5]
    found = plain({"config": SorsaConfig, 1: (tmp_path, {2})})
    assert found["1"] == [str(tmp_path), [2]]


@pytest.mark.slow
def test_without_a_terminal_no_bar_is_drawn_and_no_line_is_wrapped(places: dict[str, str], tmp_path: Path) -> None:
    words = ["-m", "svdtune", "plan", places["MODEL"], "--method", "lora", "--r", "2"]
    environment = os.environ | {"SVDTUNE_CACHE": str(tmp_path)}
    ended = subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True, check=True)
    assert "%|" not in ended.stderr
    assert any(len(line) > 80 for line in ended.stdout.splitlines()), ended.stdout


@pytest.mark.parametrize("stderr", [False, True])
def test_each_console_looks_at_its_own_stream(stderr: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """No width of the process, which a bar would take that is in a terminal."""
    for name in ("COLUMNS", "TERMINAL_WIDTH", "TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS"):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    outcome.plain_output()
    assert "COLUMNS" not in os.environ
    assert open_console(stderr=stderr).width == 1000
    monkeypatch.setattr("sys.stderr" if stderr else "sys.stdout", Terminal())
    assert open_console(stderr=stderr).width < 1000


@pytest.mark.parametrize("shell", [None, SimpleNamespace(), SimpleNamespace(kernel="a notebook's")])
def test_a_notebook_has_bars_where_its_standard_error_is_none(shell: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    assert without_bar(None) == (not hasattr(shell, "kernel"))
    assert [without_bar(asked) for asked in (True, False)] == [False, True]


def test_every_bar_asks_whether_it_is_seen() -> None:
    """By `disable`, or as `Progress` does, which makes one where its console shows it."""
    calls = [
        (path.name, {word.arg for word in node.keywords})
        for path in Path(svdtune.__file__).parent.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "tqdm"
    ]
    assert len(calls) >= 6
    assert {name for name, words in calls if "disable" not in words} == {"progress.py"}
