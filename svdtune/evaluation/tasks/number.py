"""Numeric answers: the last number in the completion must equal the last number in the reference."""

import re
from decimal import Decimal

from svdtune.errors import SvdtuneError
from svdtune.evaluation.tasks.task import Grade, Reference, Task

# A minus sign right after a digit subtracts ("9-4"): it does not belong to the number that follows.
_NUMBER = re.compile(r"(?:(?<!\d)-)?\d+(?:\.\d+)?")


def last_number(text: str) -> str | None:
    """The last number written in digits, after deleting every comma ("1,234" is 1234); None where there is none.

    Deleting commas is what the evaluation of the LLM-Adapters benchmark does, which SARA's results use. It also joins
    "3,4" into 34.
    """
    numbers = _NUMBER.findall(text.replace(",", ""))
    return numbers[-1] if numbers else None


def check_number(reference: Reference) -> None:
    """Refuse a reference without a number."""
    if last_number(str(reference)) is None:
        raise SvdtuneError(
            f"task 'number' needs a number in every reference, but found none in {str(reference)[:80]!r}; "
            "fix that row, or grade with --task exact"
        )


def grade_number(completion: str, reference: Reference) -> Grade:
    """Compare the last numbers of both texts as exact decimals, so that 18, 18.0 and $18 agree."""
    expected = last_number(str(reference))
    assert expected is not None
    answer = last_number(completion)
    return Grade(extracted=answer, correct=answer is not None and Decimal(answer) == Decimal(expected))


NUMBER = Task(
    "number",
    "the last number of the completion equals the last number of the reference",
    grade_number,
    check=check_number,
)
