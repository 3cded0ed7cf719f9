"""`check_file`: the format, the counts, and every malformed row with its place."""

import json
from pathlib import Path
from typing import Any

import pytest

from svdtune.data.check import check_file
from svdtune.errors import SvdtuneError

ADAPTERS = {"instruction": "1 + 1?", "input": "", "output": "2", "answer": "2"}
HUMAN_EVAL = {
    "task_id": "HumanEval/0",
    "prompt": "def f(a):\n",
    "entry_point": "f",
    "canonical_solution": "    return a\n",
    "test": "def check(candidate):\n    pass\n",
}


def jsonl(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("row", "name"),
    [
        (ADAPTERS, "LLM-Adapters"),
        (HUMAN_EVAL, "HumanEval"),
        ({"problem": "1?", "solution": "$\\boxed{1}$", "level": "Level 1"}, "MATH"),
        ({"query": "1?", "response": "It is 1. The answer is: 1", "type": "GSM_SV"}, "MetaMathQA"),
        ({"query": "Sort.", "answer": "sorted(x)", "lang": "python"}, "CodeFeedback"),
        ({"mr": "name[A], food[B]", "ref": "A has B."}, "E2E (CSV)"),
        ({"text": "a line"}, "plain text"),
        ({"question": "1?", "answer": "1\n#### 1,000"}, "GSM8K"),
        ({"own": "x"}, None),
    ],
)
def test_formats_are_told_by_their_fields_and_good_rows_pass(tmp_path: Path, row: Any, name: str | None) -> None:
    found = check_file(jsonl(tmp_path / "a.jsonl", row, row))
    assert (found.format and found.format.name, found.rows, found.faults, found.repeated) == (name, 2, [], 1)


@pytest.mark.parametrize(
    ("row", "change", "reason"),
    [
        (ADAPTERS, {"answer": "two"}, "answer 'two' is no number"),
        (ADAPTERS, {"instruction": " "}, "field 'instruction' is empty"),
        (ADAPTERS, {"instruction": "? Answer Choices: (A) 1", "answer": "F"}, "answer 'F' is no letter from A to E"),
        (
            ADAPTERS,
            {"instruction": "?\n\nAnswer format: true/false", "answer": "yes"},
            "answer 'yes' is none of true, false",
        ),
        (HUMAN_EVAL, {"entry_point": "g"}, "prompt does not define 'g'"),
        (HUMAN_EVAL, {"test": ""}, "test does not define check"),
        (HUMAN_EVAL, {"canonical_solution": "return ("}, "prompt and canonical_solution are not Python"),
        ({"problem": "1?", "solution": "$\\boxed{1}$"}, {"solution": "1"}, "solution has no \\boxed answer"),
        ({"query": "1?", "response": "The answer is: 1"}, {"response": "1"}, "response does not say 'The answer is:'"),
        ({"mr": "name[A]", "ref": "A."}, {"mr": "name A"}, "mr 'name A' is not of the form slot[value]"),
        ({"question": "1?", "answer": "#### 1"}, {"answer": "1"}, "answer does not end in '#### ' and a number"),
        ({"own": 1, "other": 2}, {"own": None}, ""),
    ],
)
def test_what_makes_a_row_malformed(tmp_path: Path, row: Any, change: Any, reason: str) -> None:
    found = check_file(jsonl(tmp_path / "a.jsonl", row, row | change))
    assert [(fault.place, fault.reason[: len(reason)]) for fault in found.faults] == (
        [("line 2", reason)] if reason else []
    )


def test_all_faults_are_listed_those_of_the_file_and_those_of_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join([json.dumps(ADAPTERS), "{", "[1]", json.dumps({"instruction": "?"})]))
    found = check_file(path)
    assert found.rows == 4
    assert [place for place, _ in found.faults] == ["line 2", "line 3", "line 4"]
    assert found.faults[2].reason == "has no field 'input'"


def test_rows_that_ask_the_same_are_counted(tmp_path: Path) -> None:
    found = check_file(
        jsonl(tmp_path / "a.jsonl", ADAPTERS, ADAPTERS, ADAPTERS | {"instruction": "1+1 ?", "answer": "3"})
    )
    assert (found.repeated, found.same_question) == (1, 2)


def test_a_file_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("[1")
    with pytest.raises(SvdtuneError, match="is not valid JSON"):
        check_file(path)


def test_the_papers_files_are_well_formed(shared_data: Path) -> None:
    files = [
        path
        for path in shared_data.rglob("*")
        if path.is_file() and path.suffix != ".tsv" and path.name != "trainset.csv.gz"
    ]
    assert len(files) >= 20
    for path in files:
        found = check_file(path)
        assert (found.faults, found.format is None) == ([], False), path
