"""Leaks between training and test data: questions that are the same but for case, spaces and
punctuation."""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.typing import NDArray

from svdtune.errors import SvdtuneError

_SHOWN = 5
_WORDS = re.compile(r"\d+(?:\.\d+)?|[^\W\d_]+|[_+*/^=<>]|-(?=\s*\d)")


def normalise(question: str) -> str:
    """The words, numbers and operators of a text: lower case, no punctuation, one space between.

    What changes a number or a formula stays: 2.5 is not 25, −3 is not 3, and 2 + 3 is not 2 − 3.
    """
    text = unicodedata.normalize("NFKC", question).casefold().replace("−", "-")
    return " ".join(_WORDS.findall(text))


@dataclass(frozen=True)
class Questions:
    """What rows ask, each question as a digest of its words: 16 bytes in place of the text.

    Attributes:
        digests: int64 of shape (questions, 2), those of a row behind each other.
        rows: int64 of shape (questions,), the row that asks each.
    """

    digests: NDArray[np.int64]
    rows: NDArray[np.int64]

    @classmethod
    def of(cls, asked: Sequence[str | Sequence[str]]) -> "Questions":
        """The questions of rows; `asked` has the one or the several of each, at least one."""
        each = [[one] if isinstance(one, str) else one for one in asked]
        digests = b"".join(blake2b(normalise(text).encode(), digest_size=16).digest() for one in each for text in one)
        rows = np.repeat(np.arange(len(each)), [len(one) for one in each])
        return cls(np.frombuffer(digests, dtype=np.int64).reshape(-1, 2), rows)

    @classmethod
    def join(cls, parts: Iterable["Questions"]) -> "Questions":
        """The questions of all parts, whose rows follow each other."""
        digests, rows, before = [cls.of([]).digests], [cls.of([]).rows], 0
        for part in parts:
            digests.append(part.digests)
            rows.append(part.rows + before)
            before += len(part)
        return cls(np.concatenate(digests), np.concatenate(rows))

    def first(self) -> "Questions":
        """The first question of each row."""
        _, places = np.unique(self.rows, return_index=True)
        return Questions(self.digests[places], self.rows[places])

    def __len__(self) -> int:
        """How many rows there are."""
        return int(self.rows[-1]) + 1 if len(self.rows) else 0


def leaks(test: Questions, train: Questions) -> list[tuple[int, int]]:
    """Pairs (row of `test`, first row of `train`) of the same question, in the order of `test`."""
    alike = np.flatnonzero(np.isin(train.digests[:, 0], test.digests[:, 0]))
    seen: dict[bytes, int] = {}
    for at in alike:
        seen.setdefault(train.digests[at].tobytes(), int(train.rows[at]))
    found = ((int(row), seen.get(digest.tobytes())) for digest, row in zip(test.digests, test.rows, strict=True))
    return [(index, where) for index, where in found if where is not None]


def refuse_leaks(test: Questions, train: Questions, test_name: str, train_name: str) -> None:
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


def questions(prompt: Any, completion: str = "") -> list[str]:
    """All that a row asks: its prompt, and of a chat each of the user's turns; of plain text, which
    has no prompt, the text."""
    if isinstance(prompt, str):
        return [prompt or completion]
    return [question_text(prompt), *(question_text([turn]) for turn in prompt if turn["role"] == "user")]
