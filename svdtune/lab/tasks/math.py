r"""MATH: the reference is a solution whose last \boxed{} holds the answer.

paper   as SORSA's published code, see `sorsa_math`
strict  the answer that the text marks (a box, "####", "the answer is"), else its last formula or
        number; equal if the same text but for spacing and units, or the same mathematics by
        math-verify. Numbers must agree to six decimals
"""

import re

from svdtune.errors import SvdtuneError
from svdtune.evaluation.tasks.answers import after_hashes, boxed
from svdtune.evaluation.tasks.task import Grade, Reference, Task
from svdtune.lab.tasks.sorsa_math import grade_sorsa
from svdtune.lab.tasks.symbolic import same_formula

_STATED = re.compile(r"\banswer\s*(?:(?:is|are|was)\b|[:=])\s*:?\s*", re.IGNORECASE)
_FORMULA = re.compile(r"(?<!\\)\$\$?(.+?)(?<!\\)\$\$?|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
# "$1$ and $-2$": one answer of several formulas.
_FORMULAS = re.compile(rf"(?:{_FORMULA.pattern})(?:\s*(?:,|and|or|,\s*and)\s*(?:{_FORMULA.pattern}))*", re.DOTALL)
_LAST_NUMBER = re.compile(r"(?<![\w.])-?\d[\d,]*(?:\.\d+)?(?:/\d+)?")
_WORDS = re.compile(r"\\(?:text|textbf|textit|mathrm|mbox|operatorname)\s*\{([^{}]*)\}")
_NOISE = (
    (r"\\(?:left|right|!|,|;|:|quad|qquad)(?![a-zA-Z])|(?<!\\)\\ |~", ""),
    (r"\\[dt]frac", r"\\frac"),
    (r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}"),
    (r"\\frac\s*(\d)\s*\{", r"\\frac{\1}{"),
    (r"\\sqrt\s*(\d)", r"\\sqrt{\1}"),
    (r"\^\s*\{?\s*\\circ\s*\}?|\\degree|°", ""),
    (r"\\[$%]|[$%]", ""),
    (r"(?<=\d)\{,\}(?=\d)", ""),
    (r"\s+", ""),
)
_BASED = re.compile(r"(-?\w+)_\{?(\d+)\}?")
_UNIT_POWER = re.compile(r"\}\^\{?(\d)\}?$")
_THOUSANDS = re.compile(r"-?\d{1,3}(?:,\d{3})+(?:\.\d+)?")


def grade_strict(completion: str, reference: Reference) -> Grade:
    """Compare the answers of both texts as mathematics."""
    expected, answer = boxed(str(reference)), answer_formula(completion)
    assert expected is not None
    return Grade(answer, answer is not None and same_mathematics(answer, expected))


def answer_formula(text: str) -> str | None:
    """The formula that a text gives as its answer, None where it gives none."""
    marked = boxed(text) or after_hashes(text) or _stated(text)
    if marked:
        return marked
    formulas = list(_FORMULA.finditer(text))
    if formulas:
        return _inside(formulas[-1])
    numbers = _LAST_NUMBER.findall(text)
    return numbers[-1].rstrip(",") if numbers else None


def _inside(formula: re.Match[str]) -> str:
    return next(filter(None, formula.groups())).strip()


def _stated(text: str) -> str | None:
    r"""What follows the last "answer is", up to the end of its line or sentence; formulas there are
    taken whole."""
    found = list(_STATED.finditer(text))
    if not found:
        return None
    rest = text[found[-1].end() :].lstrip()
    if formulas := _FORMULAS.match(rest):
        return ",".join(_inside(found) for found in _FORMULA.finditer(formulas[0]))
    return re.split(r"\n|(?<!\\)[.!?](?=\s|$)", rest, maxsplit=1)[0].strip() or None


def same_mathematics(answer: str, expected: str) -> bool:
    """Whether two formulas mean the same, however they are written.

    Raises:
        SvdtuneError: if math-verify is not installed.
    """
    one, other = _plain(answer), _plain(expected)
    if one == other or _without_words(one) == other or one == _without_words(other):
        return True
    if _WORDS.search(answer + expected) and re.fullmatch(r"[a-zA-Z]{2,}", other):
        return one.lower() == other.lower()
    if _BASED.fullmatch(one) or _BASED.fullmatch(other):
        return _same_digits(one, other)
    if _unit_power(one, other):
        return False
    return same_formula("math_verify", _value_alone(one, other), _value_alone(other, one))


def _plain(formula: str) -> str:
    """A formula without what changes only its looks; words keep their letters."""
    for pattern, replacement in _NOISE:
        formula = re.sub(pattern, replacement, formula)
    formula = formula.rstrip(".")
    return formula.replace(",", "") if _THOUSANDS.fullmatch(formula) else formula


def _without_words(plain: str) -> str:
    r"""Units in \text{} left out where a number stands before them; a formula of words alone
    becomes its letters."""
    if _WORDS.fullmatch(plain):
        return _WORDS.sub(r"\1", plain)
    return _WORDS.sub("", plain) if re.match(r"-?[\d.\\]", plain) else plain


def _same_digits(answer: str, expected: str) -> bool:
    """Compare numbers in a base: 52_8 is 52_{8}, and 52 where the base goes without saying, but not
    52_9 and not 42."""
    wanted, given = _BASED.fullmatch(expected), _BASED.fullmatch(answer)
    if wanted is None:
        return False
    return given.groups() == wanted.groups() if given else answer == wanted[1]


def _unit_power(one: str, other: str) -> bool:
    """Whether both have units, in different powers: cm² and cm³."""
    powers = [_UNIT_POWER.findall(side)[-1:] for side in (one, other)]
    return all(powers) and powers[0] != powers[1]


def _value_alone(one: str, other: str) -> str:
    """The right side of "x=5" where the other is just 5."""
    name, equals, value = one.partition("=")
    return (
        value
        if equals and "=" not in other and re.fullmatch(r"\\?[a-zA-Z]+(?:\([a-z]\))?|[a-z]_\{?\w\}?", name)
        else one
    )


def check_math(reference: Reference) -> None:
    r"""Refuse a reference without a \boxed answer."""
    if boxed(str(reference)) is None:
        raise SvdtuneError(
            f"task 'math' needs a solution with a \\boxed answer as every reference, but found {str(reference)[-80:]!r}"
        )


MATH = Task(
    "math",
    "MATH: the formula given as the answer means what the boxed one does",
    grade_strict,
    grade_sorsa,
    check=check_math,
)
