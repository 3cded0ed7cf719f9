"""HumanEval: which code is taken from a completion in either mode, and the data set's own
solutions."""

import gzip
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from svdtune.errors import SvdtuneError
from svdtune.lab.sandbox import missing_protections
from svdtune.lab.tasks.humaneval import HUMANEVAL, paper_code, strict_code

PROMPT = 'import math\n\n\ndef area(r: float) -> float:\n    """Area of a disc."""\n'
PROBLEM = {
    "prompt": PROMPT,
    "entry_point": "area",
    "test": "def check(candidate):\n    assert abs(candidate(2) - 4 * math.pi) < 1e-9\n",
}
BODY = "    return math.pi * r * r\n"
WHOLE = f"def area(r):\n{BODY}"


@pytest.fixture
def _sandbox():
    try:
        lacking = "; ".join(missing_protections())
    except SvdtuneError as error:
        lacking = str(error)
    if lacking:
        pytest.skip(f"this system has no whole sandbox: {lacking}")


@pytest.mark.usefixtures("_sandbox")
@pytest.mark.parametrize(
    ("completion", "strict", "paper"),
    [
        (BODY, True, True),
        (f"{BODY}\n\nThis computes the area.\n", True, False),
        (f"```python\n{WHOLE}```", True, True),
        (f"Sure!\n```python\n{PROMPT}{BODY}```\nIt works as follows. ```python\nprint(1)\n```", True, True),
        (f"```\n{WHOLE}```", True, False),
        (f"```py\n{WHOLE}```", True, False),
        (f"'''python\n{WHOLE}'''", True, False),
        # an indented body alone loses its first indentation in the paper's mode
        (f"```python\n{BODY}```", True, False),
        # cut at the length limit, behind the code
        (f"```python\n{WHOLE}", True, False),
        # the second block is the solution
        (f"```python\nprint('for example')\n```\nand now\n```python\n{WHOLE}```", True, False),
        (f"{WHOLE}\nprint(area(1))\n", True, True),
        (f"from math import pi\n{WHOLE}\nThat is all.", True, False),
        (f"Here is the code:\n\n{WHOLE}", True, False),
        ("    return 3 * r * r\n", False, False),
        ("", False, False),
        ("I cannot do that.", False, False),
        ("    import os; os._exit(0)\n", False, False),
        ("```python\nimport sys\nsys.exit(0)\n```", False, False),
    ],
)
def test_both_modes(completion: str, strict: bool, paper: bool):
    grades = HUMANEVAL.grade(completion, PROBLEM)
    assert (grades.strict.correct, grades.paper.correct) == (strict, paper), grades


def test_the_papers_mode_takes_what_its_code_takes():
    assert paper_code(" \n```python  \n    x\n\n```\n```python\ny\n```") == "x\n"
    assert paper_code("```python\nno end") == "```python\nno end"
    assert paper_code("```\nx\n```") == "```\nx\n```"


def test_a_continuation_ends_where_the_indentation_does():
    assert strict_code("    a = 1\n\n    return a\n\ndef other():\n    pass\n", "f") == "    a = 1\n\n    return a\n"
    assert strict_code("return 1\nprint()", "f") == "return 1"


@pytest.mark.parametrize("reference", ["a text", ["two"], {"prompt": "", "test": ""}, {**PROBLEM, "test": None}])
def test_rows_without_tests_are_refused(reference):
    with pytest.raises(SvdtuneError, match="needs the fields prompt, entry_point, test"):
        HUMANEVAL.check(reference)


@pytest.mark.slow
@pytest.mark.usefixtures("_sandbox")
def test_the_data_sets_own_solutions_pass_and_empty_ones_fail(shared_data: Path):
    with gzip.open(shared_data / "humaneval" / "HumanEval.jsonl.gz", "rt", encoding="utf-8") as file:
        problems = [json.loads(line) for line in file]
    own = [(problem["canonical_solution"], problem) for problem in problems]
    fenced = [(f"```python\n{problem['prompt']}{solution}```", problem) for solution, problem in own]
    empty = [("", problem) for problem in problems]

    def both(pair: tuple[str, dict]) -> tuple[bool, bool]:
        strict, paper = HUMANEVAL.grade(*pair)
        return strict.correct, paper.correct

    with ThreadPoolExecutor(2) as pool:
        for pairs, expected in ((own, True), (fenced, True), (empty, False)):
            wrong = [
                (problem["task_id"], found)
                for (_, problem), found in zip(pairs, pool.map(both, pairs), strict=True)
                if found != (expected, expected)
            ]
            assert not wrong
