"""The row formats that the papers' data come in: which fields tell them, what a row asks, and what makes a row malformed."""

import ast
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]

_OPTIONS = re.compile(r"Answer format: ([\w/]+)\s*$")


@dataclass(frozen=True)
class Format:
    """A kind of row.

    Attributes:
        name: What reports call it.
        fields: A row with all of these is of this format; formats are tried in order.
        question: The field that says what is asked. Two rows with the same question are duplicates.
        problem: Says what is wrong with a row that has the fields, None if nothing is.
        references: Whether rows that ask the same are several references of one meaning.
    """

    name: str
    fields: tuple[str, ...]
    question: str
    problem: Callable[[Row], str | None]
    references: bool = False


def detect(rows: Sequence[Row]) -> Format | None:
    """The format of the first row, None if it is none of those known."""
    present = set(rows[0]) if rows else set()
    return next((found for found in FORMATS if present.issuperset(found.fields)), None)


def row_problem(row: Row, known: Format) -> str | None:
    """What is wrong with a row of a known format."""
    missing = [name for name in known.fields if name not in row]
    if missing:
        return f"has no field {missing[0]!r}"
    empty = [name for name in (known.question,) if not str(row[name] or "").strip()]
    return f"field {empty[0]!r} is empty" if empty else known.problem(row)


def _adapters(row: Row) -> str | None:
    """LLM-Adapters: the answer is one of the options named, a letter for multiple choice, or a number."""
    asked, answer = str(row["instruction"]), str(row["answer"]).strip()
    if options := _OPTIONS.search(asked):
        expected = options[1].split("/")
        return None if answer in expected else f"answer {answer!r} is none of {', '.join(expected)}"
    if "Answer Choices:" in asked:
        return None if re.fullmatch("[A-E]", answer) else f"answer {answer!r} is no letter from A to E"
    return None if _is_number(answer) else f"answer {answer!r} is no number"


def _gsm8k(row: Row) -> str | None:
    answer = re.search(r"#### (\S+)\s*$", str(row["answer"]))
    return None if answer and _is_number(answer[1]) else "answer does not end in '#### ' and a number"


def _math(row: Row) -> str | None:
    return None if re.search(r"\\f?box(?:ed)?\b", str(row["solution"])) else "solution has no \\boxed answer"


def _metamath(row: Row) -> str | None:
    return None if "The answer is:" in str(row["response"]) else "response does not say 'The answer is:'"


def _code_feedback(row: Row) -> str | None:
    return None if str(row["answer"]).strip() else "answer is empty"


def _human_eval(row: Row) -> str | None:
    if f"def {row['entry_point']}(" not in row["prompt"]:
        return f"prompt does not define {row['entry_point']!r}"
    if "def check(" not in row["test"]:
        return "test does not define check"
    try:
        ast.parse(row["prompt"] + row["canonical_solution"])
    except SyntaxError as error:
        return f"prompt and canonical_solution are not Python: {error.msg}"
    return None


def _e2e_csv(row: Row) -> str | None:
    if not re.fullmatch(r"\s*[^\[\],]+\[[^\]]*\](, [^\[\],]+\[[^\]]*\])*\s*", str(row["mr"])):
        return f"mr {row['mr']!r:.60} is not of the form slot[value], slot[value]"
    return None if str(row["ref"]).strip() else "ref is empty"


def _e2e_pair(row: Row) -> str | None:
    if not str(row["context"]).startswith("name : "):
        return "context does not begin with 'name : '"
    return None if str(row["completion"]).strip() else "completion is empty"


def _nothing(_: Row) -> str | None:
    return None


def _is_number(text: str) -> bool:
    try:
        float(text.replace(",", ""))
    except ValueError:
        return False
    return True


FORMATS = (
    Format("LLM-Adapters", ("instruction", "input", "output", "answer"), "instruction", _adapters),
    Format("HumanEval", ("task_id", "prompt", "entry_point", "canonical_solution", "test"), "prompt", _human_eval),
    Format("MATH", ("problem", "solution"), "problem", _math),
    Format("MetaMathQA", ("query", "response"), "query", _metamath),
    Format("CodeFeedback", ("query", "answer"), "query", _code_feedback),
    Format("E2E (CSV)", ("mr", "ref"), "mr", _e2e_csv, references=True),
    Format("E2E (linearised)", ("context", "completion"), "context", _e2e_pair, references=True),
    Format("E2E (meanings only)", ("MR",), "MR", _nothing),
    Format("GSM8K", ("question", "answer"), "question", _gsm8k),
    Format("MAWPS", ("original_text", "equation", "ans"), "original_text", _nothing),
)
