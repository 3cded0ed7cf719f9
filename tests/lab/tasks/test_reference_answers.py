"""Golden: every data set's own reference answers are right in both modes, and changed ones are
wrong in strict mode."""

import re
from fractions import Fraction
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
        ("singleeq", 485, 484),
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


def rewritten_number(answer: str) -> list[str]:
    """Five ways to write a number as an answer."""
    number = Fraction(answer.replace(",", ""))
    digits = answer.replace(",", "")
    whole = int(digits) if number.denominator == 1 and "." not in digits else None
    return [
        f"It takes 3 steps. The answer is {f'{whole:,}.00' if whole is not None else f'{digits}0'}.",
        f"Therefore, {digits} is the answer.",
        f"Thus \\boxed{{\\frac{{{2 * number.numerator}}}{{{2 * number.denominator}}}}}"
        if len(digits) < 10
        else f"\\boxed{{{digits}}}",
        f"The answer is not {int(number) + 1} but {digits}. There were 7 steps.",
        f"**Answer:** {digits}{'' if '.' in digits else '.'} It took 9 steps.",
    ]


def rewritten_letter(answer: str) -> list[str]:
    other = "B" if answer == "A" else "A"
    return [
        f"\\boxed{{\\text{{{answer}}}}}",
        f"Therefore, {answer} is the answer.",
        f"The answer is not {other} but {answer}.",
        f"{answer} is correct, because {other} is too small.",
        f"A train leaves. **Answer:** ({answer}) 5 km",
    ]


def rewritten_formula(answer: str) -> list[str]:
    larger = re.sub(r"\\[dt]?frac(?![a-z])", r"\\dfrac", answer)
    sized = answer if "\\left" in answer else answer.replace("(", " \\left( ").replace(")", " \\right) ")
    return [
        f"The answer is ${larger}$.",
        f"Step 1. Thus \\[\\boxed{{ {answer} }}\\] in 3 steps.",
        f"Therefore, ${answer}$ is the answer.",
        f"**Answer:** $\\displaystyle {answer}$",
        f"#### {sized}",
    ]


@pytest.mark.parametrize("name", GROUPS["sara_math"])
def test_rewritten_answers_of_the_mathematical_sets_are_right(name: str) -> None:
    dataset = CATALOGUE[name]
    task = get_task(dataset.task)
    rewritten = rewritten_letter if dataset.task == "letter" else rewritten_number
    for row in read_rows(name, "all"):
        answer = str(row[dataset.answer])
        wrong = [one for one in rewritten(answer) if not task.grade(one, row[dataset.answer]).strict.correct]
        assert not wrong, (wrong, answer)


def test_rewritten_answers_of_gsm8k_are_right() -> None:
    task = get_task("gsm8k")
    for row in read_rows("gsm8k", "test"):
        answer = row["answer"].rpartition("#### ")[2]
        wrong = [one for one in rewritten_number(answer) if not task.grade(one, row["answer"]).strict.correct]
        assert not wrong, (wrong, answer)


def test_rewritten_answers_of_math500_are_right() -> None:
    task = get_task("math")
    wrong = [
        (one, solution[-60:])
        for solution in (row["solution"] for row in read_rows("math500", "test"))
        for one in rewritten_formula(boxed(solution))
        if not task.grade(one, solution).strict.correct
    ]
    assert not wrong


@pytest.mark.parametrize(("name", "rows"), [("math500", 500), ("math", 5000)])
def test_math(name: str, rows: int) -> None:
    task, solutions = get_task("math"), [row["solution"] for row in read_rows(name, "test")]
    assert len(solutions) == rows
    for solution in solutions:
        # one problem is about boxes, and its solution says that they are not its answer
        assert task.grade(solution, solution).strict.correct or "we have not boxed the correct answer" in solution
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
