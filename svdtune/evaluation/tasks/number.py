"""Numeric answers: worded arithmetic, graded exactly, and as the evaluation of the LLM-Adapters
benchmark does.

paper   the last number after deleting every comma, within 0.001 of the reference: "3,4" is 34,
        "9-4" is −4
strict  the number that the text marks as its answer, else its last one, as an exact fraction by
        `quantities`. Units must agree where both texts have one; two answers at once ("5 or 6") are
        none
"""

import re
from fractions import Fraction
from functools import lru_cache

from svdtune.errors import SvdtuneError
from svdtune.evaluation.tasks.answers import marked_answers, plain_words, without_denied
from svdtune.evaluation.tasks.notation import plain
from svdtune.evaluation.tasks.quantities import Quantity, first_quantity, last_quantity
from svdtune.evaluation.tasks.task import Grade, Reference, Task

_PAPER_NUMBER = re.compile(r"-?\d+\.?\d*")
_TOLERANCE = 0.001  # of the paper
_ITEM = r"(?:[$£€]\s?)?[-−]?\d[\d,]*(?:\.\d+)?(?:/\d+)?"
_EXACT_DECIMALS = 6  # a reference with more has been rounded


def grade_paper(completion: str, reference: Reference) -> Grade:
    """Grade as `evaluate.py` of LLM-Adapters, which SARA's results are made with."""
    answer = _last_paper_number(completion)
    expected = _last_paper_number(str(reference))
    assert expected is not None
    # A number too long for a float becomes inf, and inf - inf is no number: wrong, as in the
    # original.
    correct = answer is not None and abs(float(expected) - float(answer)) <= _TOLERANCE
    return Grade(answer, correct)


def _last_paper_number(text: str) -> str | None:
    found = _PAPER_NUMBER.findall(text.replace(",", ""))
    return found[-1] if found else None


def grade_strict(completion: str, reference: Reference) -> Grade:
    """Compare the answers of both texts as exact numbers, so that 18, 18.0, 36/2 and $18 agree."""
    expected = answer_quantity(str(reference))
    assert expected is not None
    answer = answer_quantity(completion)
    return Grade(answer.written if answer else None, answer is not None and same_quantity(answer, expected))


@lru_cache(1024)  # a reference is read for each of an item's samples
def answer_quantity(text: str) -> Quantity | None:
    """The number that a text gives as its answer; None where it gives none, or two.

    Where the text marks its answer, that is the first number there. Where it does not, or no mark
    holds a number, it is the last number of the text.
    """
    for marked in marked_answers(text):
        found = first_quantity(plain(without_denied(marked, _ITEM)))
        if found is not None:
            break
    else:
        found = last_quantity(plain(without_denied(plain_words(text), _ITEM)))
    return found if found is not None and found.value is not None else None


def same_quantity(answer: Quantity, expected: Quantity) -> bool:
    """Whether two numbers are equal, and their units where both have one.

    Where `expected` is a rounded decimal fraction (0.3333333333333333), equal to a millionth.
    """
    if answer.value is None or expected.value is None:
        return False
    if answer.unit and expected.unit and answer.unit != expected.unit:
        return False
    rounded = len(expected.written.partition(".")[2]) > _EXACT_DECIMALS
    difference = abs(answer.value - expected.value)
    return difference <= Fraction(1, 10**_EXACT_DECIMALS) if rounded else difference == 0


def check_number(reference: Reference) -> None:
    """Refuse a reference without a number."""
    if answer_quantity(str(reference)) is None or _last_paper_number(str(reference)) is None:
        raise SvdtuneError(
            f"task 'number' needs a number in every reference, but found none in {str(reference)[:80]!r}; "
            "fix that row, or grade with --task exact"
        )


NUMBER = Task("number", grade_strict, grade_paper, check=check_number)
