"""Numbers: `number` and `gsm8k`, what is right in strict mode and what the papers' code makes of
the same text."""

import pytest

from svdtune.evaluation import get_task
from svdtune.evaluation.tasks.number import answer_quantity


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("43 + 28 = 71\n71 - 16 = 55\n#### 55", "55"),
        ("She pays $1,234,567.50 in all.", "1234567.50"),
        ("The answer is -3.", "-3"),
        ("The answer is −3.", "-3"),
        ("9-4", "5"),
        ("9 - 4 = 5", "5"),
        ("minus (-7)", "-7"),
        ("Version 2.", "2"),
        ("3,4", "4"),
        ("12,34", "34"),
        ("half of it", None),
        ("", None),
        ("It takes 3/4 of an hour", "3/4"),
        ("The answer is 1 1/2 cups", "1 1/2"),
        (r"so \boxed{\frac{3}{4}}", "3/4"),
        (r"\boxed{1{,}000}", "1000"),
        ("the answer is -$5", "-5"),
        ("the answer is $-5", "-5"),
        ("1e3", "1e3"),
        (".5", ".5"),
        ("The answer is 18 apples, of which 3 are red", "18"),
        ("The answer is 5 + 6 = 11.", "11"),
        ("The answer is 5 or 6.", None),
        ("The answer is 5 arms and 3 legs", None),
        ("The answer is 2,500 dollars, not 2", "2500"),
        ("The answer is 3. Next problem: 9 apples", "3"),
        ("The answer is 2. Wait, the answer is 3.", "3"),
        ("**Answer: 42**", "42"),
    ],
)
def test_the_number_given_as_the_answer(text: str, number: str | None) -> None:
    answer = answer_quantity(text)
    assert (answer and answer.written) == number


@pytest.mark.parametrize(
    ("completion", "reference", "strict", "paper"),
    [
        ("so 18.0", "#### 18", True, True),
        ("$1,000", "1000", True, True),
        ("0.1", "0.10", True, True),
        ("18.5", "18", False, False),
        ("-18", "18", False, False),
        ("I do not know", "18", False, False),
        ("18 apples, of which 3 are red", "18", False, False),
        ("18 apples, of which 3 are red", "3.0", True, True),
        ("The answer is 1/3", "0.3333333333333333", True, False),  # the paper reads 3
        ("0.333", "0.3333333333333333", False, True),
        ("18.0009", "18", False, True),  # within a thousandth
        ("3,4", "34", False, True),  # commas are deleted
        ("3,4", "4", True, False),
        ("9-4", "-4", False, True),  # the minus of a difference
        ("The answer is 7. It took 5 steps.", "7", True, False),  # the last number
        ("The answer is 7 pens.", "7", True, True),
        ("9" * 400, "1", False, False),
        ("1/0", "1", False, False),
    ],
)
def test_number_in_both_modes(completion: str, reference: str, strict: bool, paper: bool) -> None:
    grades = get_task("number").grade(completion, reference)
    assert (grades.strict.correct, grades.paper.correct) == (strict, paper)


@pytest.mark.parametrize(
    ("completion", "reference", "strict", "paper"),
    [
        ("The answer is: 18", "#### 18", True, True),
        ("The answer is 18", "#### 18", True, False),  # no colon
        ("The answer is: 1,234,567", "#### 1,234,567", True, False),  # reads 1234
        ("The answer is: 1,234,567", "#### 1234", False, True),
        ("The answer is: 1,234", "#### 1,234", True, True),
        ("The answer is: 2.5", "#### 2", False, True),  # rounds half to even
        ("The answer is: 3.5", "#### 4", False, True),
        ("The answer is: 2.5", "#### 3", False, False),
        ("The answer is: 7/2", "#### 4", False, True),
        ("The answer is: 7/0", "#### 7", False, True),
        ("The answer is: 7/00", "#### 7", False, False),  # the original stops with an error
        ("The answer is: /5", "#### 5", True, False),
        ("The answer is: -3", "#### -3", True, True),
        ("The answer is: $18", "#### 18", True, True),
        ("The answer is: 18 dollars and 2 cents", "#### 18", False, True),
        ("The answer is: 5. The answer is: 6", "#### 6", True, True),
        ("#### 18", "#### 18", True, False),
        ("The answer is: none", "#### 18", False, False),
        ("The answer is: " + "9" * 400, "#### 18", False, False),
    ],
)
def test_gsm8k_in_both_modes(completion: str, reference: str, strict: bool, paper: bool) -> None:
    grades = get_task("gsm8k").grade(completion, reference)
    assert (grades.strict.correct, grades.paper.correct) == (strict, paper)
