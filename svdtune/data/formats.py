"""Row formats by name: which fields tell them, what a row asks, and what makes a row malformed."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from svdtune.registry import Registry

Row = Mapping[str, Any]


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


FORMATS: Registry[Format] = Registry("data")


def detect(rows: Sequence[Row]) -> Format | None:
    """The format of the first row, None if it is none of those known."""
    present = set(rows[0]) if rows else set()
    return next((found for found in FORMATS.values() if present.issuperset(found.fields)), None)


def row_problem(row: Row, known: Format) -> str | None:
    """What is wrong with a row of a known format."""
    missing = [name for name in known.fields if name not in row]
    if missing:
        return f"has no field {missing[0]!r}"
    empty = [name for name in (known.question,) if not str(row[name] or "").strip()]
    return f"field {empty[0]!r} is empty" if empty else known.problem(row)
