"""Tasks: both modes, exact match, and the list of names."""

import pytest

from svdtune.data.catalogue import CATALOGUE
from svdtune.errors import SvdtuneError
from svdtune.evaluation import Grade, Task, get_task
from svdtune.evaluation.tasks import TASKS


@pytest.mark.parametrize(
    ("completion", "reference", "correct"),
    [(" yes\n", "yes", True), ("Yes", "yes", False), ("yes.", "yes", False), ("a  b", "a b", False)],
)
def test_exact_forgives_outer_white_space_only(completion: str, reference: str, correct: bool) -> None:
    assert get_task("exact").grade(completion, reference).strict.correct is correct


def test_an_unknown_task_is_refused_with_the_known_ones() -> None:
    with pytest.raises(SvdtuneError, match=", ".join(TASKS)):
        get_task("nubmer")


def test_a_task_grades_in_both_modes() -> None:
    task = Task("a", strict=lambda c, r: Grade(c, c == r), paper=lambda c, r: Grade(c[:1], True))
    assert task.grade("xy", "x") == (Grade("xy", False), Grade("x", True))
    assert Task("a", strict=None).grade("xy", "x") == (None, None)


@pytest.mark.parametrize(
    ("task", "reference", "message"),
    [
        ("number", "none here", "task 'number' needs a number in every reference.*'none here'"),
        ("letter", "F", "task 'letter' needs a letter from A to E"),
        ("choice", "answer6", "task 'choice' needs one of true, solution1"),
        ("gsm8k", "It is 4.", "task 'gsm8k' needs '#### ' and a number"),
        ("math", "It is 4.", r"task 'math' needs a solution with a \\boxed answer"),
    ],
)
def test_a_reference_without_an_answer_is_refused(task: str, reference: str, message: str) -> None:
    with pytest.raises(SvdtuneError, match=message):
        get_task(task).check(reference)


def test_every_set_that_is_scored_names_a_task() -> None:
    named = {dataset.task for dataset in CATALOGUE.values() if dataset.task}
    assert named - {"e2e", "humaneval"} <= set(TASKS)
