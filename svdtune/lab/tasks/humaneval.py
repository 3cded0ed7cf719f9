"""HumanEval: a completion is right if the program it makes with its prompt passes the tests, run in
the sandbox.

Strict grading finds the code the way a reader would. The paper's (SORSA's published code) takes
what stands between the first "```python" and the next "```", or else the whole completion, and puts
it behind the prompt: an indented body loses the indentation of its first line, a block that was cut
at the length limit keeps its fence, and both fail.
"""

import re
from functools import lru_cache
from typing import Any

from svdtune.errors import SvdtuneError
from svdtune.evaluation.tasks.task import Grade, Reference, Task
from svdtune.lab.sandbox import check_function, require_protections

_FIELDS = ("prompt", "entry_point", "test")
_PAPER_BLOCK = re.compile(r"```python\s*([\s\S]*?)\s```")
# A fence of backticks, or of the quotes that SORSA's prompt shows; one that is never closed lasts
# to the end.
_BLOCK = re.compile(r"^[ \t]*(```|''')[ \t]*(?:python|py|python3)?[ \t]*\n(.*?)(?:^[ \t]*\1|\Z)", re.S | re.M | re.I)
_CODE_LINE = re.compile(r"(?:def|class|import|from|async|@)\b|[)\]}#@]")


def strict_code(completion: str, function: str) -> str:
    """The code of a completion.

    The first fenced block that defines the function, or else the first fenced block; without any,
    the lines from the first definition or import on if the function is defined among them; or else
    what continues the function that the prompt began: all lines before the first that is not
    indented.
    """
    blocks = [match.group(2) for match in _BLOCK.finditer(completion)]
    if blocks:
        return next((block for block in blocks if defines(block, function)), blocks[0])
    lines = completion.split("\n")
    if defines(completion, function):
        start = next(i for i, line in enumerate(lines) if _CODE_LINE.match(line))
        return "\n".join(_leading(lines[start:], lambda line: _indented(line) or bool(_CODE_LINE.match(line))))
    # The line that the prompt ended on is continued by the first, whatever its indentation.
    return "\n".join([lines[0], *_leading(lines[1:], _indented)])


def paper_code(completion: str) -> str:
    """What the paper's code takes for the code of a completion."""
    match = _PAPER_BLOCK.search(completion)
    return match.group(1) if match else completion


def defines(code: str, function: str) -> bool:
    """Whether a function of that name is defined at the left margin."""
    return re.search(rf"^def[ \t]+{re.escape(function)}\b", code, re.M) is not None


def _indented(line: str) -> bool:
    return not line.strip() or line[0] in " \t"


def _leading(lines: list[str], belongs: Any) -> list[str]:
    return lines[: next((i for i, line in enumerate(lines) if not belongs(line)), len(lines))]


def grade_humaneval(completion: str, reference: Reference) -> Grade:
    """Run prompt and code; a block that is a whole function follows the prompt's unfinished one and
    replaces it."""
    problem = _problem(reference)
    code = strict_code(completion, problem["entry_point"])
    return _grade(code, problem, _finished(problem) if defines(code, problem["entry_point"]) else problem["prompt"])


def grade_humaneval_paper(completion: str, reference: Reference) -> Grade:
    """Run the prompt and what the paper's code takes."""
    problem = _problem(reference)
    return _grade(paper_code(completion), problem, problem["prompt"])


def _grade(code: str, problem: dict[str, str], before: str) -> Grade:
    # Some tests call functions that the prompt defines, so that it is what they start from.
    return Grade(code, _passes(f"{before}{code}\n", problem["entry_point"], problem["test"], _finished(problem)))


def _finished(problem: dict[str, str]) -> str:
    """The prompt as a program by itself: its last function does nothing, and whoever needs it
    replaces it."""
    return f"{problem['prompt']}\n    pass\n"


@lru_cache(maxsize=4096)
def _passes(program: str, function: str, tests: str, setup: str) -> bool:
    """Both modes mostly find the same code: run it once."""
    return check_function(program, function, tests, setup).passed


def check_humaneval(reference: Reference) -> None:
    """Refuse rows without tests, and systems without a whole sandbox, before anything is
    generated."""
    _problem(reference)
    require_protections()


def _problem(reference: Reference) -> dict[str, str]:
    if not isinstance(reference, dict) or not all(isinstance(reference.get(field), str) for field in _FIELDS):
        raise SvdtuneError(
            f"task 'humaneval' needs the fields {', '.join(_FIELDS)} of every problem, got {reference!r:.80}; "
            "use --data humaneval, or rows whose --answer field holds them"
        )
    return reference


HUMANEVAL = Task("humaneval", grade_humaneval, grade_humaneval_paper, check=check_humaneval, programs=True)
