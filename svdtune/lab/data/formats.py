"""The row formats that the papers' data come in."""

import ast
import re

from svdtune.data.formats import Format, Row

_OPTIONS = re.compile(r"Answer format: ([\w/]+)\s*$")


def _adapters(row: Row) -> str | None:
    """LLM-Adapters: the answer is one of the options named, a letter for multiple choice, or a
    number."""
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


def _nothing(_: Row) -> str | None:
    return None


def _is_number(text: str) -> bool:
    try:
        float(text.replace(",", ""))
    except ValueError:
        return False
    return True


ROW_FORMATS = (
    Format("LLM-Adapters", ("instruction", "input", "output", "answer"), "instruction", _adapters),
    Format("HumanEval", ("task_id", "prompt", "entry_point", "canonical_solution", "test"), "prompt", _human_eval),
    Format("MATH", ("problem", "solution"), "problem", _math),
    Format("MetaMathQA", ("query", "response"), "query", _metamath),
    Format("CodeFeedback", ("query", "answer"), "query", _code_feedback),
    Format("E2E (CSV)", ("mr", "ref"), "mr", _e2e_csv, references=True),
    Format("E2E (meanings only)", ("MR",), "MR", _nothing),
    Format("GSM8K", ("question", "answer"), "question", _gsm8k),
    Format("MAWPS", ("original_text", "equation", "ans"), "original_text", _nothing),
    Format("plain text", ("text",), "text", _nothing),
)
