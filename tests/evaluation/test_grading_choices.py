"""Choices: `letter` and `choice`, what is right in strict mode and what the papers' code makes of
the same text."""

import pytest

from svdtune.evaluation import get_task


@pytest.mark.parametrize(
    ("completion", "reference", "strict", "paper"),
    [
        ("The answer is (D).", "D", True, True),
        ("A train runs 60 km. The answer is (D).", "D", True, False),  # the article
        ("A train runs 60 km. The answer is (D).", "A", False, True),
        ("Compute it. The answer is D", "D", True, False),  # the C of Compute
        ("Answer: B", "B", True, False),  # the A of Answer
        ("so \\boxed{C}", "C", True, True),
        ("\\boxed{\\text{C}}", "C", True, True),
        ("d", "D", True, False),
        ("D) 5 km", "D", True, True),
        ("the correct option is (B)", "B", True, True),
        ("The answer is (A) or (B).", "A", False, True),
        ("either (A) or (B)", "A", False, True),
        ("the answer is a number", "A", False, False),
        ("The answer is option c", "C", True, False),
        ("The answer is 42", "A", False, False),
        ("", "A", False, False),
    ],
)
def test_letter_in_both_modes(completion: str, reference: str, strict: bool, paper: bool) -> None:
    grades = get_task("letter").grade(completion, reference)
    assert (grades.strict.correct, grades.paper.correct) == (strict, paper)


@pytest.mark.parametrize(
    ("completion", "reference", "strict", "paper"),
    [
        ("the correct answer is answer3", "answer3", True, True),
        ("the correct answer is Answer3", "answer3", True, False),
        ("not answer1; the correct answer is answer3", "answer3", True, False),  # the first named
        ("not answer1; the correct answer is answer3", "answer1", False, True),
        ("answer1 or answer2", "answer1", False, True),
        ("answer12", "answer1", False, True),
        ("the correct answer is true", "true", True, True),
        ("That is untrue", "true", False, True),
        ("solution2", "solution2", True, True),
        ("ending4", "ending4", True, True),
        ("option1", "option2", False, False),
        ("the correct answer is option2 option2", "option2", True, True),
        ("I do not know", "false", False, False),
    ],
)
def test_choice_in_both_modes(completion: str, reference: str, strict: bool, paper: bool) -> None:
    grades = get_task("choice").grade(completion, reference)
    assert (grades.strict.correct, grades.paper.correct) == (strict, paper)
