"""Formulas: `math` strictly and as SORSA's code grades, faults included; and what a model can write
to do harm."""

import os
import threading
from pathlib import Path

import pytest

from svdtune.evaluation import get_task
from svdtune.lab.tasks.math import answer_formula, same_mathematics
from svdtune.lab.tasks.symbolic import Comparer


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("\\frac{1}{2}", "0.5"),
        ("\\dfrac12", "\\frac{1}{2}"),
        ("1/2", "\\frac12"),
        ("-1/2", "-\\frac12"),
        ("-\\frac{1}{2}", "\\frac{-1}{2}"),
        ("0.15", "\\frac{3}{20}"),
        ("2\\sqrt{3}", "\\sqrt{12}"),
        ("\\frac{\\sqrt3}{3}", "\\frac{1}{\\sqrt{3}}"),
        ("x=5", "5"),
        ("5", "x=5"),
        ("-2,1", "1,-2"),
        ("1+\\sqrt{19}, 1-\\sqrt{19}", "1 \\pm \\sqrt{19}"),
        ("x^2+2x+1", "(x+1)^2"),
        ("2+3i", "3i+2"),
        ("(-\\infty,2]", "(-\\infty, 2]"),
        ("(3, \\frac{\\pi}{2})", "\\left( 3, \\frac{\\pi}{2} \\right)"),
        ("\\{1,2\\}", "\\{2,1\\}"),
        ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", "\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}"),
        ("Evelyn", "\\text{Evelyn}"),
        ("\\text{evelyn}", "\\text{Evelyn}"),
        ("90", "90^\\circ"),
        ("90^{\\circ}", "90^\\circ"),
        ("5\\text{ cm}", "5"),
        ("12", "12\\text{ inches}"),
        ("10\\%", "10"),
        ("1,000", "1000"),
        ("1{,}000", "1000"),
        ("32348", "\\$32,\\!348"),
        ("52_{8}", "52_8"),
        ("52", "52_8"),
    ],
)
def test_the_same_mathematics(answer: str, expected: str) -> None:
    assert same_mathematics(answer, expected)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("5", "6"),
        ("-3", "3"),
        ("50", "0.5"),
        ("0.5", "50\\%"),
        ("5000", "50"),
        ("9999", "10000"),
        ("0.33", "\\frac13"),
        ("\\sqrt{2}", "1.41"),
        ("(1,2)", "(2,1)"),
        ("(1,2)", "[1,2]"),
        ("[1,2)", "[1,2]"),
        ("1,2,3", "1,2"),
        ("3,4", "34"),
        ("52_9", "52_8"),
        ("42", "52_8"),
        ("x+1", "x-1"),
        ("y=5", "x=5"),
        ("F", "E"),
        ("Bob", "\\text{Evelyn}"),
        ("440\\text{ cm}^3", "440\\text{ cm}^2"),
        ("a/b", "7"),
        ("\\sqrt", "3"),
        ("", "3"),
        ("\\frac{1}{0}", "3"),
        ("x" * 500, "3"),
        ("(" * 200, "3"),
    ],
)
def test_not_the_same_mathematics(answer: str, expected: str) -> None:
    assert not same_mathematics(answer, expected)


@pytest.mark.parametrize(
    ("text", "formula"),
    [
        ("So $x=3$. Thus the answer is $\\frac{3}{4}$.", "\\frac{3}{4}"),
        ("The answer is: \\sqrt{2}", "\\sqrt{2}"),
        ("The answer is: 11,\\! 111.", "11,\\! 111"),
        ("we get \\boxed{\\frac{1}{2}} and more \\boxed{3}.", "3"),
        ("\\boxed 5", "5"),
        ("\\fbox{7}", "7"),
        ("cut at \\boxed{3", "3"),
        ("The answers: answer is $1$ and $-2$.", "1,-2"),
        ("Hence $x^2$ is \\(4\\).", "4"),
        ("It is 1,234.", "1,234"),
        ("no", None),
    ],
)
def test_the_formula_given_as_the_answer(text: str, formula: str | None) -> None:
    assert answer_formula(text) == formula


@pytest.mark.parametrize(
    ("completion", "gold", "strict", "paper"),
    [
        ("The answer is: \\frac{1}{2}.", "\\frac12", True, True),
        ("\\boxed{\\frac{1}{2}}", "\\frac12", True, False),  # reads only behind "The answer is: "
        ("The answer is: 0.5", "\\frac{1}{2}", True, True),
        # becomes \frac{1}{2} before the percentages are tried
        ("The answer is: 50", "0.5", False, False),
        ("The answer is: 60", "0.6", False, True),  # a factor of 100
        ("The answer is: 0.6", "60", False, True),
        ("The answer is: 10000", "10001", False, True),  # a ten-thousandth
        ("The answer is: x/y", "7", False, True),  # normalising raises
        ("The answer is: \\sqrt", "7", False, True),
        ("The answer is: 5\\text{ m}\\text{ x}", "7", False, True),
        ("The answer is: 2\\text{ cm}", "2", True, True),
        ("The answer is: x = 5", "5", True, True),
        ("The answer is: (1, 2)", "[1,2]", False, False),
        ("The answer is: [3, 4)", "3,4)", False, False),
        ("The answer is: 2, 1)", "(2,1)", False, True),  # round brackets do not count
        ("The answer is: 2*x + 2*y", "2*(x+y)", True, True),
        ("The answer is: \\sqrt{12}", "2\\sqrt{3}", True, False),  # LaTeX is compared as text
        ("The answer is: sqrt(2)", "1.4142", False, True),  # a thousandth
        ("no answer", "7", False, False),
    ],
)
def test_math_in_both_modes(completion: str, gold: str, strict: bool, paper: bool) -> None:
    grades = get_task("math").grade(completion, f"Therefore it is $\\boxed{{{gold}}}$.")
    assert (grades.strict.correct, grades.paper.correct) == (strict, paper)


def test_the_paper_counts_no_answer_as_right_where_the_reference_cannot_be_read() -> None:
    grades = get_task("math").grade("I give up", "It is $\\boxed 5$.")
    assert (grades.strict.correct, grades.paper.correct) == (False, True)


@pytest.mark.parametrize("kind", ["math_verify", "sympy"])
@pytest.mark.family(1)
def test_a_formula_that_never_ends_is_not_equal(kind: str) -> None:
    comparer = Comparer(seconds=0.5)
    for formula in ("9**9**9**9**9", "9^{9^{9^{9^9}}}", "1000000000!", "(9^{9999})^{99999}"):
        assert not comparer(kind, formula, "3")
    comparer.seconds = 60
    assert comparer(kind, "1 + 2", "3")  # in the process that was started again
    comparer.close()


def test_an_expression_cannot_run_code(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    for attack in (
        f"open('{mark}', 'w')",
        "().__class__",
        "__import__(chr(111)+chr(115))",
        "Symbol.mro()",
        "exec(chr(49))",
        f'eval("open({str(mark)!r}, 1)")',
    ):
        assert not get_task("math").grade(f"The answer is: {attack}", "\\boxed{3}").paper.correct
    assert os.listdir(tmp_path) == []


def test_formulas_are_compared_in_any_thread() -> None:
    found: list[bool] = []
    thread = threading.Thread(target=lambda: found.append(same_mathematics("\\sqrt{4}", "2")))
    thread.start()
    thread.join()
    assert found == [True]
