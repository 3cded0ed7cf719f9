r"""MATH: the reference is a solution whose last \boxed{} holds the answer.

paper   as SORSA's published code, see `sorsa_math`
strict  the answer that the text marks, else its last formula or number; equal if the same text but
        for spacing, the same number by `quantities`, or the same mathematics by math-verify.
        Numbers must agree to six decimals

math-verify takes a point, a set and an interval of the same numbers as equal, a and A, and reads a
part of what it cannot read whole (3 of 3:1). Those are told apart here before it is asked. A list
without brackets is a set, and no point: "1, 2" is \{2, 1\} and not (1, 2). A unit may be missing,
but two units must agree.
"""

import re
from typing import Any

from svdtune.errors import SvdtuneError
from svdtune.evaluation.tasks.answers import boxed, joined_boxes, marked_answers, without_denied
from svdtune.evaluation.tasks.notation import SUPERSCRIPTS, plain
from svdtune.evaluation.tasks.number import same_quantity
from svdtune.evaluation.tasks.quantities import first_quantity, repeating
from svdtune.evaluation.tasks.task import Grade, Reference, Task
from svdtune.evaluation.tasks.units import unit_at
from svdtune.lab.tasks.sorsa_math import grade_sorsa
from svdtune.lab.tasks.symbolic import same_formula

_FORMULA = re.compile(r"(?<!\\)\$\$?(.+?)(?<!\\)\$\$?|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
# "$1$ and $-2$": one answer of several formulas.
_FORMULAS = re.compile(rf"(?:{_FORMULA.pattern})(?:\s*(?:,|and|or|,\s*and)\s*(?:{_FORMULA.pattern}))*", re.DOTALL)
_LAST_NUMBER = re.compile(r"(?<![\w.])-?\d[\d,]*(?:\.\d+)?(?:/\d+)?")
_ITEM = r"(?:\$[^$]+\$|[-−]?\d[\d,]*(?:\.\d+)?(?:/\d+)?)"
_WORDS = re.compile(r"\\(?:text|textbf|textit|mathrm|mbox|operatorname)\s*\{([^{}]*)\}")
_LISTED = re.compile(r"\s*\\text\s*\{\s*(and|or)\s*\}\s*")
_LISTED_SIGN = re.compile(r",?\\text\{(?:and|or)\}")
_NOISE: tuple[tuple[str, Any], ...] = (
    (r"\\(?:left|right|displaystyle|!|,|;|:|quad|qquad)(?![a-zA-Z])|(?<!\\)\\ |~", ""),
    (r"\\\{\s*([a-z])\s*(?:\\mid|:|\|)\s*([^{}]*\1[^{}]*)\\\}", r"\2"),  # {x | x > 2}
    (r"\\varnothing", r"\\emptyset"),
    (r"\\[dt]frac", r"\\frac"),
    (r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}"),
    (r"\\frac\s*(\d)\s*\{", r"\\frac{\1}{"),
    (r"\\sqrt\s*(\d)", r"\\sqrt{\1}"),
    (r"\^\s*\{?\s*\\circ\s*\}?|\\degree|°", ""),
    (r"\\[$%]|[$%]", ""),
    (r"(?<=\d)\{,\}(?=\d)", ""),
    (r"\\(?:leqslant|leq)(?![a-zA-Z])|≤", r"\\le "),
    (r"\\(?:geqslant|geq)(?![a-zA-Z])|≥", r"\\ge "),
    (r"(?<![\\a-zA-Z])infinity|∞", r"\\infty "),
    (r"(?<![\\a-zA-Z])pi(?![a-zA-Z])|π", r"\\pi "),
    (r"−", "-"),
    (r"√\s*(?:\(([^()]*)\)|(\d+|[a-z]))", r"\\sqrt{\1\2}"),
    (r"±", r"\\pm "),
    (r"[·⋅×]", r"\\cdot "),
    (r"∪", r"\\cup "),
    (r"∈", r"\\in "),
    (r"[⁰¹²³⁴-⁹⁻]+", lambda found: f"^{{{found[0].translate(SUPERSCRIPTS)}}}"),
)
_SIGN = r"(?:\^\s*\{?\s*\\circ\s*\}?|\\degree|°)"
_DEGREES = re.compile(
    r"(\\?(?:sin|cos|tan|cot|sec|csc))\s*\\?(?:left)?[({]?\s*(-?\d+(?:\.\d+)?)\s*"
    rf"(?:{_SIGN}\s*\\?(?:right)?[)}}]?|\\?(?:right)?[)}}]\s*{_SIGN})"
)
_REPEATING = re.compile(r"(\d+\.\d*)(?:\\overline|\\dot|\\bar)\s*\{?(\d+)\}?")
_BASED = re.compile(r"(-?\w+)_\{?(\d+)\}?")
_THOUSANDS = re.compile(r"-?\d{1,3}(?:,\d{3})+(?:\.\d+)?")
_RATIO = re.compile(r"(-?[\d.]+):(-?[\d.]+)")
_CHOICE = re.compile(r"\(?([A-Z])\)?\.?")
_ASSIGNED = re.compile(r"[a-z]=[^,=]+(?:,[a-z]=[^,=]+)+")
_PROSE = re.compile(r"(?<![\\A-Za-z])(?!(?:sin|cos|tan|cot|sec|csc|log|ln|exp|sqrt|pi|infinity|max|min)\b)[A-Za-z]{2,}")


def grade_strict(completion: str, reference: Reference) -> Grade:
    """Compare the answers of both texts as mathematics. Boxes that commas join are a list where the
    reference is one; else the last of them is the answer."""
    listed, solution = answer_formula(completion, several=True), str(reference)
    if listed is not None and _same_answer(listed, solution):
        return Grade(listed, True)
    answer = answer_formula(completion)
    return Grade(answer, answer is not None and answer != listed and _same_answer(answer, solution))


def _same_answer(answer: str, solution: str) -> bool:
    """Compare with the solution's last box, and with all that it is joined to: of some solutions
    "\\boxed{3} or \\boxed{5}" are the answer, of others either. An answer is right in two forms."""
    expected = {boxed(solution), joined_boxes(solution)[-1].whole}
    forms = re.split(r"\\text\{ (?:and|or) \}", answer)
    return any(
        same_mathematics(answer, one) or (len(forms) > 1 and all(same_mathematics(form, one) for form in forms))
        for one in expected
        if one is not None
    )


def answer_formula(text: str, several: bool = False) -> str | None:
    """The formula that a text gives as its answer, None where it gives none; `several` as in
    `marked_answers`."""
    words = None  # "\\boxed{5}. The answer is thus odd.": the answer where nothing else is
    for marked in marked_answers(text, several):
        answer = _formulas(without_denied(marked, _ITEM).strip())
        if re.search(r"[\d\\]|^[A-Za-z]$", answer):
            return answer
        words = words or answer
    if words:
        return words
    formulas = list(_FORMULA.finditer(text))
    if formulas:
        return _inside(formulas[-1])
    numbers = _LAST_NUMBER.findall(text)
    return numbers[-1].rstrip(",") if numbers else None


def _formulas(marked: str) -> str:
    """The formulas of a sentence that gives an answer; all of it where it has none, or a number
    before them ("5 for $x = 2$")."""
    found = _FORMULAS.search(marked)
    if found is None or re.search(r"\d", marked[: found.start()]):
        return marked
    inside = ",".join(_inside(formula) for formula in _FORMULA.finditer(found[0]))
    unit = unit_at(marked, found.end())
    return f"{inside}\\text{{{marked[found.end() : unit.end]}}}" if unit else inside


def _inside(formula: re.Match[str]) -> str:
    return next(filter(None, formula.groups())).strip()


def same_mathematics(answer: str, expected: str) -> bool:
    """Whether two formulas mean the same, however they are written.

    Raises:
        SvdtuneError: if math-verify is not installed.
    """
    alike = _same_number(answer, expected)
    if alike is not None:
        return alike
    one, other = _plain(answer), _plain(expected)
    if _other_units(answer, expected):
        return False
    if one == other or _without_words(one) == other or one == _without_words(other):
        return True
    letters = [_CHOICE.fullmatch(_without_words(side)) for side in (one, other)]
    if letters[0] and letters[1]:
        return letters[0][1] == letters[1][1]
    if _WORDS.search(answer + expected) and re.fullmatch(r"[a-zA-Z]{2,}", _without_words(other)):
        return _without_words(one).lower() == _without_words(other).lower()
    if _BASED.fullmatch(one) or _BASED.fullmatch(other):
        return _same_digits(one, other)
    one, other = (
        _LISTED_SIGN.sub(",", _without_words(side)) if "<" not in side and ">" not in side else side
        for side in (one, other)
    )
    if _other_form(one, other):
        return False
    return same_formula("math_verify", _ratio(_value_alone(one, other)), _ratio(_value_alone(other, one)))


def _same_number(answer: str, expected: str) -> bool | None:
    """The verdict where the reference is a number and the answer is one too, or holds words; None
    where formulas have to be compared."""
    gold = plain(expected)
    wanted = first_quantity(gold) if re.search(r"\d", gold) else None
    if wanted is None or wanted.value is None or not _nothing_else(gold, wanted.start, wanted.end):
        return None
    given_text = plain(answer)
    given = first_quantity(given_text)
    if given is None:
        return None
    if given.value is not None and _nothing_else(given_text, given.start, given.end):
        return same_quantity(given, wanted)
    # "7, since 3 + 4 = 7", "5 apples and 3 pears": words around it
    prose = _PROSE.search(_WORDS.sub("", answer)) and not re.search(r"\\[a-zA-Z]", _WORDS.sub("", answer))
    return same_quantity(given, wanted) if prose else None


def _nothing_else(text: str, start: int, end: int) -> bool:
    return (
        re.fullmatch(r"\s*", text[:start]) is not None
        and re.fullmatch(r"[\sA-Za-z]*[.,;]?\s*", text[end:]) is not None
        and (re.fullmatch(r"[A-Za-z](?![A-Za-z]).*", text[end:], re.DOTALL) is None)
    )


def _plain(formula: str) -> str:
    """A formula without what changes only its looks; words keep their letters."""
    formula = _DEGREES.sub(r"\1(\\frac{\2\\pi}{180})", formula)
    formula = _REPEATING.sub(_as_fraction, formula)
    formula = _LISTED.sub(r"\\text{\1}", formula)
    for pattern, replacement in _NOISE:
        formula = re.sub(pattern, replacement, formula)
    # a command's name ends at a space
    formula = re.sub(
        r"(?<=\\[a-z]{2})\s+(?![a-zA-Z])|(?<=[a-z]{3})\s+(?![a-zA-Z])|(?<![a-z])\s+|\s+(?![a-zA-Z])", "", formula
    )
    formula = re.sub(r"(?<![\\a-zA-Z])([a-zA-Z]+)\s+(?=[a-zA-Z])", r"\1", formula).strip().rstrip(".")
    return formula.replace(",", "") if _THOUSANDS.fullmatch(formula) else formula


def _as_fraction(found: re.Match[str]) -> str:
    value = repeating(found[1], found[2])
    return f"\\frac{{{value.numerator}}}{{{value.denominator}}}" if value is not None else found[0]


def _without_words(plain: str) -> str:
    r"""Units in \text{} left out where a number stands before them; a formula of words alone
    becomes its letters."""
    if _WORDS.fullmatch(plain):
        return _WORDS.sub(r"\1", plain)
    return (
        re.sub(rf"{_WORDS.pattern}(?:\^\{{?\d\}}?)?", lambda f: f[0] if f[1] in ("or", "and") else "", plain)
        if re.match(r"-?[\d.\\]", plain)
        else plain
    )


def _same_digits(answer: str, expected: str) -> bool:
    """Compare numbers in a base: 52_8 is 52_{8}, and 52 where the base goes without saying, but not
    52_9 and not 42."""
    wanted, given = _BASED.fullmatch(expected), _BASED.fullmatch(answer)
    if wanted is None:
        return False
    return given.groups() == wanted.groups() if given else answer == wanted[1]


def _other_units(one: str, other: str) -> bool:
    """Whether both have units, and different ones: cm² and cm³, m and cm."""
    units = []
    for side in (one, other):
        found = list(re.finditer(rf"{_WORDS.pattern}\s*(?P<power>\^\s*\{{?\d\}}?)?", side))
        units.append(unit_at(found[-1][1].strip() + (found[-1]["power"] or ""), 0) if found else None)
    return units[0] is not None and units[1] is not None and units[0].name != units[1].name


def _other_form(one: str, other: str) -> bool:
    """Whether two formulas differ in what math-verify does not tell apart: a ratio and a number,
    a point, an interval and a set, small and capital letters."""
    if (":" in one) != (":" in other):
        return True
    forms = [_brackets(side) for side in (one, other)]
    if None not in forms and forms[0] != forms[1] and not (_ASSIGNED.fullmatch(one) or _ASSIGNED.fullmatch(other)):
        return True
    letters = [set(re.findall(r"[A-Za-z]", re.sub(r"\\[a-zA-Z]+", "", _WORDS.sub("", side)))) for side in (one, other)]
    return letters[0] != letters[1] and {c.lower() for c in letters[0]} == {c.lower() for c in letters[1]}


def _brackets(formula: str) -> str | None:
    """The brackets around a list, "" for a set and for a list without any; None for no list."""
    depth, commas, closed_early = 0, [], False
    for at, character in enumerate(formula):
        depth += (character in "([{") - (character in ")]}")
        closed_early |= depth == 0 and at < len(formula) - 1
        if character == ",":
            commas.append(depth)
    if not commas or "\\begin" in formula or "\\cup" in formula:
        return None
    if formula[0] in "([" and formula[-1] in ")]" and not closed_early:
        return formula[0] + formula[-1]
    if formula.startswith("\\{") or 0 in commas:
        return ""
    return None


def _ratio(formula: str) -> str:
    return _RATIO.sub(r"\\frac{\1}{\2}", formula) if _RATIO.fullmatch(formula) else formula


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


MATH = Task("math", grade_strict, grade_sorsa, check=check_math)
