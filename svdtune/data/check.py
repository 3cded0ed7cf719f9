"""What a data file is: its format, how many rows it has, which are malformed, and which ask the
same."""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from svdtune.data.files import Fault, Located, scan
from svdtune.data.formats import Format, detect, row_problem
from svdtune.data.leaks import normalise


@dataclass(frozen=True)
class Checked:
    """What was found in a file.

    Attributes:
        path: The file.
        format: The format of its rows, None if it is none of the papers'.
        fields: The fields of its first row.
        rows: How many rows it has, malformed ones included.
        faults: What is wrong, with the place, in the order of the file.
        repeated: How many rows are equal to an earlier one.
        same_question: How many ask what an earlier one asks, but for case, spaces and punctuation.
    """

    path: Path
    format: Format | None
    fields: tuple[str, ...]
    rows: int
    faults: list[Fault]
    repeated: int
    same_question: int


def check_file(path: Path) -> Checked:
    """Read a whole file and report on it.

    Raises:
        SvdtuneError: if it cannot be read at all.
    """
    found = list(scan(path))
    rows = [item for item in found if isinstance(item, Located)]
    known = detect([item.row for item in rows])
    faults = [fault for item in found if (fault := _fault(item, known, rows))]
    whole = Counter(json.dumps(item.row, sort_keys=True, default=str) for item in rows)
    asked = [normalise(str(item.row.get(known.question, ""))) for item in rows] if known else []
    return Checked(
        path=path,
        format=known,
        fields=tuple(rows[0].row) if rows else (),
        rows=len(found),
        faults=faults,
        repeated=len(rows) - len(whole),
        same_question=len(asked) - len(set(asked)),
    )


def _fault(item: Located | Fault, known: Format | None, rows: list[Located]) -> Fault | None:
    if isinstance(item, Fault):
        return item
    if known is not None:
        problem = row_problem(item.row, known)
    else:
        missing = [name for name in rows[0].row if name not in item.row]
        problem = f"has no field {missing[0]!r}, as {rows[0].place} has" if missing else None
    return Fault(item.place, problem) if problem else None
