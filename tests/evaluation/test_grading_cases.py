"""Adversarial answers: kinds × wordings, with the verdict that is right, from two tables.

`grading_cases.tsv` has bare answers, which every wording here states; `grading_sentences.tsv` has
whole completions. Where reasonable people differ, the last column says which way a case goes.
"""

import csv
from pathlib import Path

import pytest

from svdtune.evaluation import get_task
from svdtune.evaluation.tasks.answers import marked_answers

WORDINGS = {
    "number": [
        "{}",
        "The answer is {}.",
        "It took 3 steps.\nThe answer is: {}",
        "2 + 2 = 4\n#### {}",
        "So we have 7 in all, and thus \\boxed{{{}}}.",
        "**Answer:** {}",
        "The answer to this problem is {}\n\nThat was easy, with 9 steps.",
    ],
    "math": ["The answer is ${}$.", "Thus $\\boxed{{{}}}$ in 3 steps.", "The answer is: {}"],
}


def table(name: str) -> list[dict[str, str]]:
    with Path(__file__).with_name(name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


def graded(task: str, completion: str, reference: str) -> bool:
    reference = f"It is $\\boxed{{{reference}}}$." if task == "math" else reference
    strict = get_task(task).grade(completion, reference).strict
    assert strict is not None
    return strict.correct


def named(case: dict[str, str]) -> str:
    return "-".join([case["task"], case["kind"], case.get("answer") or case["completion"], case["reference"]])


CASES, SENTENCES = table("grading_cases.tsv"), table("grading_sentences.tsv")


@pytest.mark.parametrize("case", CASES, ids=named)
def test_an_answer_in_every_wording(case: dict[str, str]) -> None:
    worded = [wording.format(case["answer"]) for wording in WORDINGS[case["task"]]]
    wrong = [one for one in worded if graded(case["task"], one, case["reference"]) != (case["right"] == "yes")]
    assert not wrong


@pytest.mark.parametrize("case", SENTENCES, ids=named)
def test_a_whole_completion(case: dict[str, str]) -> None:
    completion = case["completion"].replace("\\n", "\n")
    assert graded(case["task"], completion, case["reference"]) == (case["right"] == "yes")


@pytest.mark.parametrize("task", ["number", "letter", "math"])
def test_an_answer_that_goes_on_without_end_is_graded(task: str) -> None:
    """Of words that take an answer back, repeated, a pattern can be read in 2ⁿ ways."""
    for words in ("wait ", "wait, ", "no, ", "hmm, ", "actually, ", "or rather ", "I mean ", "sorry oh wait "):
        completion = f"The answer is $5$. {words * 100}"
        assert graded(task, completion, "5") == (task != "letter")


@pytest.mark.parametrize("task", ["number", "math"])
def test_an_answer_taken_back_a_thousand_times_is_the_last(task: str) -> None:
    for words in ("5, wait, ", "5, no, ", "5; I mean ", "5, no, not 7, but "):
        assert graded(task, f"The answer is {words * 1200}6.", "6")


def test_a_run_of_boxes_without_end_is_read_in_bounded_pieces() -> None:
    for run in ("$\\boxed{5}$, " * 3000, "".join(f"$\\boxed{{{i}}}$, " for i in range(3000)) + "$\\boxed{5}$"):
        assert graded("math", run, "5")
        assert graded("number", run, "5")
        assert max(map(len, marked_answers(run, several=True))) < 200


def test_the_tables_are_large_and_have_both_verdicts_of_every_task() -> None:
    assert sum(len(WORDINGS[case["task"]]) for case in CASES) + len(SENTENCES) >= 400
    for task in ("number", "letter", "choice", "math"):
        assert {case["right"] for case in CASES + SENTENCES if case["task"] == task} == {"yes", "no"}
