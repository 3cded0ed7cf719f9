"""A share of rows, drawn by what they ask: rows that ask the same are in it together, or not."""

import json
from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import Any

from svdtune.data.leaks import normalise, question_text
from svdtune.data.standard import standard_row
from svdtune.errors import SvdtuneError


def in_share(rows: Sequence[Mapping[str, Any]], share: float, name: str) -> list[bool]:
    """Whether each row is in a share of them. The draw depends on nothing but the rows, and not on
    their order.

    Args:
        rows: of any format. What a row asks is its prompt where the columns tell a format, else all
            of it.
        share: of what is asked, between 0 and 1; at least one question.
        name: what to call the rows in an error.

    Raises:
        SvdtuneError: the share is not between 0 and 1, or would be all rows.
    """
    if not 0 < share < 1:
        raise SvdtuneError(f"{share:g} is no share of {name}; expected a number between 0 and 1")
    asked = [sha256(_question(row).encode()).digest() for row in rows]
    # digests are as good as drawn by lot
    questions = sorted({*asked})
    count = max(1, round(share * len(questions)))
    if count == len(questions):
        raise SvdtuneError(
            f"a share of {share:g} is all that {name} asks ({count} question{'s' * (count > 1)}): nothing would be left. "
            "Give more rows, or a smaller share"
        )
    chosen = {*questions[:count]}
    return [question in chosen for question in asked]


def _question(row: Mapping[str, Any]) -> str:
    try:
        prompt = standard_row(row, "a row")["prompt"]
    except SvdtuneError:
        prompt = None
    if not prompt or not isinstance(prompt, str | list):  # plain text, or columns of no format
        return json.dumps(row, sort_keys=True, default=str)
    return normalise(question_text(prompt))
