"""Leaks between training and test data: questions that are the same but for case, spaces and
punctuation."""

import re
import unicodedata
from collections.abc import Sequence
from typing import Any

from svdtune.errors import SvdtuneError

_SHOWN = 5


def normalise(question: str) -> str:
    """The words, numbers and operators of a text: lower case, no punctuation, one space between.

    What changes a number or a formula stays: 2.5 is not 25, −3 is not 3, and 2 + 3 is not 2 − 3.
    """
    text = unicodedata.normalize("NFKC", question).casefold().replace("−", "-")
    return " ".join(re.findall(r"\d+(?:\.\d+)?|[^\W\d_]+|[_+*/^=<>]|-(?=\s*\d)", text))


def leaks(test: Sequence[str], train: Sequence[str | Sequence[str]]) -> list[tuple[int, int]]:
    """Pairs (index in `test`, first index in `train`) of the same question, in the order of
    `test`."""
    seen: dict[str, int] = {}
    for index, asked in enumerate(train):
        for question in [asked] if isinstance(asked, str) else asked:
            seen.setdefault(normalise(question), index)
    found = ((index, seen.get(normalise(question))) for index, question in enumerate(test))
    return [(index, where) for index, where in found if where is not None]


def refuse_leaks(test: Sequence[str], train: Sequence[str | Sequence[str]], test_name: str, train_name: str) -> None:
    """Refuse test questions that are trained on.

    Raises:
        SvdtuneError: naming the rows, and how to accept it.
    """
    found = leaks(test, train)
    if not found:
        return
    rows = ", ".join(f"row {at + 1} (training row {where + 1})" for at, where in found[:_SHOWN])
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    raise SvdtuneError(
        f"{len(found)} of the {len(test)} questions of {test_name} are also in {train_name}, which would be trained on: "
        f"{rows}{more}. Take them out, or, to reproduce a result that was made so, set data.allow_leaks: [{test_name}]"
    )


def question_text(prompt: Any) -> str:
    """A prompt as one text: a chat is the contents of its turns."""
    return prompt if isinstance(prompt, str) else "\n".join(str(turn.get("content", "")) for turn in prompt)


def questions(prompt: Any) -> list[str]:
    """All that a prompt asks: itself, and of a chat each of the user's turns."""
    if isinstance(prompt, str):
        return [prompt]
    return [question_text(prompt), *(question_text([turn]) for turn in prompt if turn["role"] == "user")]
