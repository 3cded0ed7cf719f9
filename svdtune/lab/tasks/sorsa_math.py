r"""MATH as SORSA's published code grades it, its faults included.

The answer is what stands behind the last "The answer is: ". It and the reference are normalised as
by Hendrycks et al., then compared as numbers, as texts without brackets, part by part, and as sympy
expressions. What that does wrong:

- where normalising either raises an error ("a/b" with letters, "\sqrt" at the end), the answer is
  correct, whatever it is;
- a number a hundred times as large or as small is correct, as is one that differs by less than a
  ten-thousandth of it;
- a missing answer counts as the text "None", which is correct where the reference could not be read
  either.

Two things are ours. The original evaluates the answer as Python; here only arithmetic and the
elementary functions are let through, everything else counts as not parsed. And a comparison that
takes longer than five seconds fails. LaTeX is not parsed: the original's environment lacks the
package that sympy needs for it, and it ignores the error.
"""

import re
from math import isclose

from svdtune.evaluation.tasks.task import Grade, Reference
from svdtune.lab.tasks.symbolic import same_formula

_MARK = "The answer is: "


def grade_sorsa(completion: str, reference: Reference) -> Grade:
    """Grade as `test_math` of SORSA's published code."""
    answer = _answer(completion)
    return Grade(answer, _equivalent(str(_boxed(str(reference))), str(answer)))


def _answer(completion: str) -> str | None:
    _, mark, rest = completion.rpartition(_MARK)
    if not mark:
        return None
    return rest.split(".\n")[0].strip().removesuffix(".").strip()


def _boxed(solution: str) -> str | None:
    r"""What the last \boxed{...} holds; None where it is \boxed 5, or \fbox, which the original
    cannot take apart."""
    start = max(solution.rfind("\\boxed"), -1)
    start = solution.rfind("\\fbox") if start < 0 else start
    depth = 0
    for at in range(max(start, 0), len(solution)):
        depth += (solution[at] == "{") - (solution[at] == "}")
        if solution[at] == "}" and depth == 0:
            found = solution[start : at + 1]
            return found[len("\\boxed{") : -1] if start >= 0 and found.startswith("\\boxed{") else None
    return None


def _equivalent(reference: str, answer: str) -> bool:
    try:
        one, other = _normalise(reference), _normalise(answer)
    except (AssertionError, IndexError, ValueError):
        return True  # the original then compares the reference with itself
    return _equal(one, other) or one == other


def _normalise(text: str) -> str:
    for old, new in (
        ("\n", ""),
        ("\\!", ""),
        ("\\\\", "\\"),
        ("tfrac", "frac"),
        ("dfrac", "frac"),
        ("\\left", ""),
        ("\\right", ""),
        ("^{\\circ}", ""),
        ("^\\circ", ""),
        ("\\$", ""),
    ):
        text = text.replace(old, new)
    if "\\text{ " in text:  # a unit
        parts = text.split("\\text{ ")
        assert len(parts) == 2
        text = parts[0]
    text = text.replace("\\%", "").replace(" .", " 0.").replace("{.", "{0.")
    if not text:
        return text
    text = f"0{text}" if text[0] == "." else text
    sides = text.split("=")
    text = sides[1] if len(sides) == 2 and len(sides[0]) <= 2 else text  # k = 5
    text = _brace_fractions(_brace_roots(text).replace(" ", ""))
    text = "\\frac{1}{2}" if text == "0.5" else text
    return _slash_to_fraction(text)


def _brace_roots(text: str) -> str:
    first, *rest = text.split("\\sqrt")
    return first + "".join(f"\\sqrt{part}" if part[0] == "{" else f"\\sqrt{{{part[0]}}}{part[1:]}" for part in rest)


def _brace_fractions(text: str) -> str:
    first, *rest = text.split("\\frac")
    made = first
    for part in rest:
        if part[0] == "{":
            made += f"\\frac{part}"
        elif len(part) < 2:
            return text
        elif part[1] == "{":
            made += f"\\frac{{{part[0]}}}{part[1:]}"
        else:
            made += f"\\frac{{{part[0]}}}{{{part[1]}}}{part[2:]}"
    return made


def _slash_to_fraction(text: str) -> str:
    parts = text.split("/")
    if len(parts) != 2:
        return text
    top, bottom = int(parts[0]), int(parts[1])  # a ValueError here is the fault described above
    return f"\\frac{{{top}}}{{{bottom}}}" if text == f"{top}/{bottom}" else text


def _equal(reference: str, answer: str) -> bool:
    one, other = _float(reference), _float(answer)
    if one is not None and other is not None:
        return any(isclose(value, one, rel_tol=1e-4) for value in (other / 100, other, other * 100))
    if not reference:
        return False
    reference, answer = reference.strip(), answer.strip()
    if _without_brackets(reference, answer):
        return True
    for opening, closing in ("[]", "()"):
        if all(side.startswith(opening) and side.endswith(closing) for side in (reference, answer)):
            pairs = list(zip(reference[1:-1].split(","), answer[1:-1].split(","), strict=False))
            same_length = reference.count(",") == answer.count(",")
            if same_length and all(_equal(*pair) for pair in pairs):
                return True
    return same_formula("sympy", answer, reference)


def _float(text: str) -> float | None:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return None


def _without_brackets(reference: str, answer: str) -> bool:
    square = reference.startswith("[") and reference.endswith("]") and not answer.startswith("(")
    round_ = reference.startswith("(") and reference.endswith(")") and not answer.startswith("[")
    if square or round_:
        reference, answer = reference.strip("[]()"), answer.strip("[]()")
    return re.sub(r"[{}()]", "", reference) == re.sub(r"[{}()]", "", answer)
