"""Numeric answers: worded arithmetic, graded exactly, and as the evaluation of the LLM-Adapters
benchmark does.

paper   the last number after deleting every comma, within 0.001 of the reference: "3,4" is 34,
        "9-4" is −4
strict  the number that the text marks as its answer, else its last one, as an exact fraction.
        Thousands separators, currency signs and units are read; two answers at once ("5 or 6") are
        none
"""

import re
from fractions import Fraction

from svdtune.errors import SvdtuneError
from svdtune.evaluation.tasks.answers import final_answer
from svdtune.evaluation.tasks.task import Grade, Reference, Task

_PAPER_NUMBER = re.compile(r"-?\d+\.?\d*")
_TOLERANCE = 0.001  # of the paper
_CURRENCY = r"(?:\\?[$£€]\s?)?"
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d|,\d)|\d+)"
# A minus sign right after a digit, a letter or a bracket subtracts: it does not belong to the
# number that follows.
_NUMBER = re.compile(
    rf"(?P<sign>(?<![\w)\]])[-−+])?{_CURRENCY}(?P<sign2>(?<=[$£€])-)?"
    rf"(?:(?P<whole>{_DIGITS})\s+(?=\d+/\d))?"
    rf"(?:(?P<top>{_DIGITS})\s?/\s?(?P<bottom>\d+)(?![\d/])|(?P<decimal>{_DIGITS}(?:\.\d+)?|\.\d+)(?P<power>[eE][-+]?\d{{1,3}})?)"
)
# "5 or 6", "5 arms and 3 legs": two answers.
_JOINED = re.compile(rf"(?:\s+[a-z]+){{0,2}}\s*(?:,|;|\band\b|\bor\b|&)\s*{_CURRENCY}[-−]?\d")
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
    expected = answer_number(str(reference))
    assert expected is not None
    answer = answer_number(completion)
    return Grade(answer, answer is not None and same_number(answer, expected))


def answer_number(text: str) -> str | None:
    """The number that a text gives as its answer, as written but for separators and units; None
    where it gives none.

    Where the text marks its answer, that is the first number after the mark (after the last "="
    there), and none if another number is joined to it. Where it does not, it is the last number.
    """
    marked = final_answer(text)
    if marked is None:
        found = list(_NUMBER.finditer(_plain(text)))
        return _written(found[-1]) if found else None
    marked = _plain(marked).rpartition("=")[2]
    first = _NUMBER.search(marked)
    if first is None or _JOINED.match(marked, first.end()):
        return None
    return _written(first)


def same_number(answer: str, expected: str) -> bool:
    """Whether two numbers as `answer_number` gives them are equal.

    Where `expected` is a rounded decimal fraction (0.3333333333333333), equal to a millionth.
    """
    one, other = _value(answer), _value(expected)
    rounded = len(expected.partition(".")[2]) > _EXACT_DECIMALS
    return abs(one - other) <= Fraction(1, 10**_EXACT_DECIMALS) if rounded else one == other


def _plain(text: str) -> str:
    r"""Write LaTeX's \frac{a}{b}, 1{,}000 and \$ as plain text does."""
    text = re.sub(r"\\[dt]?frac\s*\{\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\}", r" \1/\2", text)
    text = re.sub(r"-\s+(?=\d+/\d+)", "-", text)
    return text.replace("{,}", ",").replace(",\\!", ",").replace("\\,", "").replace("\\!", "").replace("**", "")


def _written(found: re.Match[str]) -> str:
    sign = "-" if found["sign"] in ("-", "−") or found["sign2"] else ""
    if found["bottom"] is not None:
        whole = f"{found['whole'].replace(',', '')} " if found["whole"] else ""
        return f"{sign}{whole}{found['top'].replace(',', '')}/{found['bottom']}"
    return f"{sign}{found['decimal'].replace(',', '')}{found['power'] or ''}"


def _value(number: str) -> Fraction:
    sign = -1 if number.startswith("-") else 1
    whole, _, part = number.lstrip("-").rpartition(" ")
    top, _, bottom = part.partition("/")
    if bottom and int(bottom) == 0:
        return Fraction(sign * int(top))  # no number; as good as any that is not the answer
    return sign * (Fraction(whole or 0) + (Fraction(int(top), int(bottom)) if bottom else Fraction(part)))


def check_number(reference: Reference) -> None:
    """Refuse a reference without a number."""
    if answer_number(str(reference)) is None or _last_paper_number(str(reference)) is None:
        raise SvdtuneError(
            f"task 'number' needs a number in every reference, but found none in {str(reference)[:80]!r}; "
            "fix that row, or grade with --task exact"
        )


NUMBER = Task(
    "number", "the number given as the answer equals the reference's", grade_strict, grade_paper, check=check_number
)
