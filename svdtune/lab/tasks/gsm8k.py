"""GSM8K: references end in "#### 18", answers in "The answer is: 18".

paper   as SORSA's published code: only behind "The answer is: ", the first thing there that looks
        like a number with at most one separator, rounded to a whole number, half to even:
        "1,234,567" is 1234, and 2.5 is 2
strict  as the task `number`
"""

import re
from fractions import Fraction

from svdtune.errors import SvdtuneError
from svdtune.evaluation.tasks.number import grade_strict
from svdtune.evaluation.tasks.task import Grade, Reference, Task

_MARK = "The answer is: "
_NUMBER = re.compile(r"[-+]?\d*[.,/]?\d+")
_REFERENCE = re.compile(r"#### (-?[0-9.,]+)")


def grade_paper(completion: str, reference: Reference) -> Grade:
    """Grade as `test_gsm` of SORSA's published code."""
    answer = _rounded(completion)
    expected = _reference_number(reference)
    assert expected is not None
    return Grade(None if answer is None else str(answer), answer is not None and answer == float(expected))


def _rounded(completion: str) -> int | None:
    """The answer as the published code reads it; where that stops with an error, there is none."""
    _, mark, rest = completion.rpartition(_MARK)
    found = _NUMBER.search(rest.strip()) if mark else None
    if found is None:
        return None
    top, slash, bottom = found[0].partition("/")
    if not slash:
        value = float(found[0].replace(",", ""))
        return None if value == float("inf") else round(value)
    if top in ("", "-", "+"):
        return None
    if bottom == "0":
        return round(float(top))
    try:
        return round(float(Fraction(int(top), int(bottom))))
    except (ZeroDivisionError, OverflowError):
        return None


def _reference_number(reference: Reference) -> str | None:
    found = _REFERENCE.search(str(reference))
    return found and found[1].replace(",", "")


def check_gsm8k(reference: Reference) -> None:
    """Refuse a reference without "#### " and a number."""
    if _reference_number(reference) is None:
        raise SvdtuneError(
            f"task 'gsm8k' needs '#### ' and a number in every reference, but found {str(reference)[-80:]!r}; "
            "fix that row, or grade with --task number"
        )


GSM8K = Task("gsm8k", grade_strict, grade_paper, check=check_gsm8k)
