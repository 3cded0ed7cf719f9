"""The process that compares formulas; run as a script, it imports nothing of svdtune. See
`symbolic`.

It writes one line when it is ready, then for every line {"kind", "answer", "expected", "seconds"}
on its input one line {"equal"}; it dies of a comparison that takes more seconds of CPU time.
"""

import json
import logging
import re
import resource
import signal
import sys
from math import isclose
from typing import Any

# What SORSA's grader may evaluate: no attribute, no text, no item access, no comparison, no
# assignment.
_HARMLESS = re.compile(r"(?!.*(?:__|\.\s*[A-Za-z_]))[\w+\-*/(),.\s]{1,200}", re.DOTALL)
_NAMES = (
    "Symbol",
    "Integer",
    "Float",
    "Rational",
    "pi",
    "E",
    "I",
    "sqrt",
    "sin",
    "cos",
    "tan",
    "log",
    "ln",
    "exp",
    "Abs",
)
_RELATION = re.compile(r"[<>]|\\(?:le|ge|lt|gt|in)(?![a-zA-Z])")
_MEMORY = 4 << 30


def same_by_math_verify(answer: str, expected: str) -> bool:
    """Whether two LaTeX formulas are equal, by math-verify; an inequality in one letter is the set
    of its solutions."""
    from math_verify import verify

    if _RELATION.search(answer + expected):
        sets = [_solutions(side) for side in (expected, answer)]
        if None not in sets:
            return bool(sets[0] == sets[1])
    gold, mine = _parsed(expected), _parsed(answer)
    return bool(gold and mine) and verify(gold, mine, timeout_seconds=None)


def _parsed(formula: str) -> list[Any]:
    from math_verify import LatexExtractionConfig, parse
    from sympy import Basic, I

    def complex_unit(one: Any) -> Any:
        return one.subs({name: I for name in one.free_symbols if name.name == "i"}) if isinstance(one, Basic) else one

    return [complex_unit(one) for one in parse(f"${formula}$", [LatexExtractionConfig()], parsing_timeout=None)]


def _solutions(formula: str) -> Any:
    """The set of numbers that an inequality, an interval or a union of them names; None for
    anything else."""
    from sympy import Interval, S, Union
    from sympy.logic.boolalg import Boolean

    sets = []
    for part in re.split(r"\\text\s*\{\s*or\s*\}|\\(?:cup|vee|lor)(?![a-zA-Z])", formula):
        found = _parsed(re.sub(r"^[a-z]\s*\\in(?![a-zA-Z])", "", part.strip().strip(",")))
        one = found[0] if found else None
        if isinstance(one, Boolean) and len(one.free_symbols) == 1:
            one = one.as_set()
        if not isinstance(one, (Interval, Union)):
            return None
        sets.append(one)
    return Union(*sets) if sets else S.EmptySet


def same_by_sympy(answer: str, expected: str) -> bool:
    """Whether two plain expressions are equal as SORSA's code says: symbolically, or numerically to
    a thousandth.

    Where one is no harmless expression, the original's arithmetic on texts would end in an error,
    which it ignores.
    """
    import sympy

    one, other = _parse(expected), _parse(answer)
    try:
        if sympy.simplify(one - other) == 0:
            return True
    except Exception:  # as the original: whatever sympy raises, try numerically
        pass
    return isclose(sympy.N(one), sympy.N(other), rel_tol=1e-3)


def _parse(text: str) -> Any:
    import sympy
    from sympy.parsing.sympy_parser import parse_expr

    if not _HARMLESS.fullmatch(text):
        raise ValueError(f"{text!r} is not evaluated")
    return parse_expr(text, global_dict={"__builtins__": {}, **{name: getattr(sympy, name) for name in _NAMES}})


def main() -> None:
    """Answer until the input ends."""
    try:
        import math_verify  # noqa: F401
    except ImportError as error:
        print(json.dumps({"missing": str(error)}), flush=True)
        return
    # math-verify warns that its own time limits are off; ours is the process's end
    logging.disable(logging.CRITICAL)
    sys.setrecursionlimit(2000)
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    kinds = {"math_verify": same_by_math_verify, "sympy": same_by_sympy}
    replies, sys.stdout = sys.stdout, sys.stderr  # what a library prints is no reply
    print(json.dumps({"ready": True}), file=replies, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, asked["seconds"])  # of CPU time: its end is this process's
        try:
            equal = bool(kinds[asked["kind"]](asked["answer"], asked["expected"]))
        except Exception:  # what cannot be parsed or compared is not equal
            equal = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps({"equal": equal}), file=replies, flush=True)


if __name__ == "__main__":
    main()
