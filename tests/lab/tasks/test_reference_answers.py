"""Golden: every data set's own reference answers are right in both modes, and changed ones are
wrong in strict mode."""

import re
from pathlib import Path

import pytest

from svdtune.data import read_rows
from svdtune.data.catalogue import CATALOGUE, GROUPS
from svdtune.evaluation import get_task
from svdtune.evaluation.tasks.answers import boxed


@pytest.fixture(autouse=True)
def _data(shared_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SVDTUNE_DATA", str(shared_data))


def graded(name: str, split: str, field: str) -> tuple[int, int, int]:
    """Rows, and how many of them are right strictly and as the paper grades, if the field is the
    completion."""
    dataset, rows = CATALOGUE[name], read_rows(name, split)
    task = get_task(dataset.task)
    grades = [task.grade(row[field], row[dataset.answer]) for row in rows]
    return len(rows), sum(g.strict.correct for g in grades), sum(g.paper.correct for g in grades)


@pytest.mark.parametrize("name", GROUPS["sara_math"])
def test_answers_of_the_mathematical_sets_are_right(name: str) -> None:
    assert len(set(graded(name, "all", "answer"))) == 1


@pytest.mark.parametrize(
    ("name", "strict", "paper"),
    [
        ("svamp", 803, 803),
        ("addsub", 370, 370),
        ("multiarith", 560, 560),
        ("singleeq", 484, 484),
        ("gsm8k_sara", 770, 771),
        ("aqua", 123, 109),  # the worked solutions come from a model, and often miss the answer
    ],
)
def test_worked_solutions_of_the_mathematical_sets(name: str, strict: int, paper: int) -> None:
    assert graded(name, "all", "output")[1:] == (strict, paper)


@pytest.mark.parametrize("name", [name for name in GROUPS["commonsense"] if name != "hellaswag"])
@pytest.mark.parametrize("field", ["answer", "output"])
def test_answers_of_the_commonsense_sets_are_right(name: str, field: str) -> None:
    assert len(set(graded(name, "test", field))) == 1


@pytest.mark.parametrize(("split", "misread"), [("test", 1), ("train", 5)])
def test_gsm8k(split: str, misread: int) -> None:
    rows, task = read_rows("gsm8k", split), get_task("gsm8k")
    answers = [row["answer"].rpartition("#### ")[2] for row in rows]
    right = [task.grade(f"The answer is: {a}", row["answer"]) for a, row in zip(answers, rows, strict=True)]
    assert all(grades.strict.correct for grades in right)
    assert sum(not grades.paper.correct for grades in right) == misread  # of a million and more
    for a, row in zip(answers, rows, strict=True):
        number = int(a.replace(",", ""))
        for near in (number + 1, -number - 1, f"{number}.5", f"{number}0"):
            if str(near) != f"{number}":
                assert not task.grade(f"The answer is: {near}", row["answer"]).strict.correct or number == 0
        assert task.grade(f"It is ${number:,}.", row["answer"]).strict.correct


@pytest.mark.parametrize(("name", "rows"), [("math500", 500), ("math", 5000)])
def test_math(name: str, rows: int) -> None:
    task, solutions = get_task("math"), [row["solution"] for row in read_rows(name, "test")]
    assert len(solutions) == rows
    for solution in solutions:
        assert task.grade(solution, solution).strict.correct
        answer = boxed(solution)
        assert task.grade(f"The answer is: ${answer}$.", solution).strict.correct
        assert task.grade(f"The answer is: {answer}.", solution).paper.correct


def test_math_near_misses() -> None:
    task, missed, forgiven = get_task("math"), 0, 0
    for row in read_rows("math500", "test"):
        answer = boxed(row["solution"])
        numbers = list(re.finditer(r"\d+", answer))
        if not numbers:
            continue
        last = numbers[-1]
        near = f"{answer[: last.start()]}{int(last[0]) + 1}{answer[last.end() :]}"
        strict = task.grade(f"The answer is: ${near}$.", row["solution"]).strict
        assert not strict.correct, (near, answer)
        forgiven += task.grade(f"The answer is: {near}", row["solution"]).paper.correct
        missed += 1
    assert (missed, forgiven) == (489, 11)
