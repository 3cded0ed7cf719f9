"""`svdtune data check`: what it says, and its exit codes."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from svdtune.cli import app


def svdtune(*words: str | Path) -> Result:
    return CliRunner().invoke(app, ["data", *map(str, words)])


def write(path: Path, *rows: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_good_file(tmp_path: Path) -> None:
    path = write(tmp_path / "gsm.jsonl", {"question": "1?", "answer": "#### 1"})
    result = svdtune("check", path)
    assert result.exit_code == 0
    assert result.stdout == f"{path}: GSM8K, 1 row\n  fields: question, answer\n"


def test_malformed_rows_are_listed_up_to_a_limit(tmp_path: Path) -> None:
    bad = {"question": "1?", "answer": "1"}
    path = write(tmp_path / "gsm.jsonl", {"question": "0?", "answer": "#### 0"}, *[bad] * 4)
    result = svdtune("check", path, "--show", "2")
    assert result.exit_code == 1
    assert "4 malformed:\n    line 2 answer does not end in '#### ' and a number\n    line 3" in result.stdout
    assert "and 2 more" in result.stdout
    assert "3 rows equal to an earlier one" in result.stdout


def test_a_folder_is_gone_through_and_the_worst_counts(tmp_path: Path) -> None:
    write(tmp_path / "in" / "a.jsonl", {"x": 1})
    (tmp_path / "in" / "b.json").write_text("[")
    (tmp_path / "in" / "notes.md").write_text("not data")
    result = svdtune("check", tmp_path)
    assert result.exit_code == 2
    assert "a.jsonl: no format of the papers, 1 row" in result.stdout
    assert "b.json line 1 is not valid JSON" in result.stdout
    assert "notes" not in result.stdout


def test_nothing_there(tmp_path: Path) -> None:
    result = svdtune("check", tmp_path / "gone.jsonl")
    assert (result.exit_code, "there is no file" in result.stdout) == (2, True)
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    assert svdtune("check", empty).exit_code == 1


def test_the_list_says_what_is_here_and_where_the_rest_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SVDTUNE_DATA", str(tmp_path))
    path = write(tmp_path / "gsm8k" / "test.jsonl", {"question": "1?", "answer": "#### 1"})
    listed = svdtune("list").stdout
    assert f"test: {path}" in listed
    assert "train: from the hub (openai/gsm8k)" in listed
    assert "svamp             all: missing: git clone" in listed
