"""What each task reads out of a text, and what it takes for the same answer."""

import pytest

from svdtune.errors import SvdtuneError
from svdtune.evaluation import Grade, Task, get_task, task_names
from svdtune.evaluation.tasks.number import last_number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("43 + 28 = 71\n71 - 16 = 55\n#### 55", "55"),
        ("She pays $1,234,567.50 in all.", "1234567.50"),
        ("The answer is -3.", "-3"),
        ("9-4", "4"),
        ("9 - 4 = 5", "5"),
        ("minus (-7)", "-7"),
        ("Version 2.", "2"),
        ("half of it", None),
        ("", None),
    ],
)
def test_last_number(text: str, number: str | None) -> None:
    assert last_number(text) == number


@pytest.mark.parametrize(
    ("completion", "reference", "correct"),
    [
        ("so 18.0", "#### 18", True),
        ("$1,000", "1000", True),
        ("0.1", "0.10", True),
        ("18.5", "18", False),
        ("-18", "18", False),
        ("I do not know", "18", False),
        ("18 apples, of which 3 are red", "18", False),
    ],
)
def test_number_compares_as_exact_decimals(completion: str, reference: str, correct: bool) -> None:
    assert get_task("number").grade(completion, reference).strict.correct is correct


def test_number_refuses_a_reference_without_one() -> None:
    with pytest.raises(SvdtuneError, match=r"needs a number in every reference.*'none here'"):
        get_task("number").check("none here")


@pytest.mark.parametrize(
    ("completion", "reference", "correct"),
    [(" yes\n", "yes", True), ("Yes", "yes", False), ("yes.", "yes", False), ("a  b", "a b", False)],
)
def test_exact_forgives_outer_white_space_only(completion: str, reference: str, correct: bool) -> None:
    assert get_task("exact").grade(completion, reference).strict.correct is correct


def test_an_unknown_task_is_refused_with_the_known_ones() -> None:
    with pytest.raises(SvdtuneError, match=", ".join(task_names())):
        get_task("nubmer")


def test_a_task_grades_in_both_modes() -> None:
    task = Task("a", "b", strict=lambda c, r: Grade(c, c == r), paper=lambda c, r: Grade(c[:1], True))
    assert task.grade("xy", "x") == (Grade("xy", False), Grade("x", True))
    assert Task("a", "b", strict=None).grade("xy", "x") == (None, None)
