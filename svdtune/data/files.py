"""Files of rows: JSON, JSONL, CSV, Parquet and plain text (also .gz), read row by row, each with
its line.

A row that is malformed comes out as a `Fault` instead of a row, so that one reader serves training,
which refuses the first fault, and `svdtune data check`, which lists them all.
"""

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from svdtune.errors import SvdtuneError
from svdtune.names import meant
from svdtune.system import explain_read_error, needs

FILES = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".txt")
_SURROGATE = re.compile(r"\\ud[89a-f]", re.IGNORECASE)
# What stands above a table's header: blank lines, and Excel's "sep=;", the sign between columns.
_BEFORE = re.compile(r'(?:\s*[\r\n])?(?:"?sep=([^\w\s"]|\t)"?\s*[\r\n])?', re.IGNORECASE)
_QUOTED = re.compile(r'(?<![^,;\t|])"(?:[^"]+|"")*+"?')  # a quote sign within a cell is text
_RECORD = re.compile(rf"(?:{_QUOTED.pattern}|[^\r\n])*+")


class Located(NamedTuple):
    """A row and where it stands: "line 3", or "row 3" where a format has no lines."""

    place: str
    row: dict[str, Any]


class Fault(NamedTuple):
    """A row that cannot be used: where it stands and why."""

    place: str
    reason: str


def kind(path: Path) -> str:
    """The file's ending, .gz aside."""
    return path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix


def scan(path: Path) -> Iterator[Located | Fault]:
    """Yield every row of a file, or what is wrong with it.

    Raises:
        SvdtuneError: if the file as a whole cannot be read: it is missing, of an unknown format,
            not text, or so damaged that no further row can be told apart.
    """
    if path.is_dir():
        raise SvdtuneError(f"{path} is a folder; name the file of rows in it, or several: [{{source: a.jsonl}}, ...]")
    if not path.is_file():
        raise SvdtuneError(f"there is no file {path}{meant(path)}")
    if kind(path) not in FILES:
        raise SvdtuneError(
            f"{path}: cannot tell its format; expected a name ending in {', '.join(FILES)} or one with .gz"
        )
    if kind(path) == ".parquet":
        return _scan_parquet(path)
    scanners = {".json": _scan_json, ".jsonl": _scan_jsonl, ".csv": _scan_csv, ".tsv": _scan_csv, ".txt": _scan_text}
    return scanners[kind(path)](_read_text(path), path)


def read_file(path: Path) -> list[dict[str, Any]]:
    """All rows of a file.

    Raises:
        SvdtuneError: as `scan`, and at the first malformed row.
    """
    rows = []
    for found in scan(path):
        if isinstance(found, Fault):
            raise SvdtuneError(f"{path} {found.place} {found.reason}")
        rows.append(found.row)
    return rows


def _read_text(path: Path) -> str:
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        return raw.decode("utf-8-sig")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise SvdtuneError(f"{path} is not a whole gzip file: {error}") from error
    except OSError as error:
        raise SvdtuneError(f"cannot read {path}: {explain_read_error(error)}") from error
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise SvdtuneError(f"{path} line {line} is not UTF-8; convert the file to UTF-8") from error


def _scan_json(text: str, path: Path) -> Iterator[Located | Fault]:
    try:
        found = _parse(text) if text.strip() else []
    except json.JSONDecodeError as error:
        hint = "; one object a line is JSONL: rename it to .jsonl" if error.msg == "Extra data" else ""
        raise SvdtuneError(f"{path} line {error.lineno} is not valid JSON: {error.msg}{hint}") from error
    except _Unusable as error:
        raise SvdtuneError(f"{path} {error}") from error
    if isinstance(found, dict):
        lists = [value for value in found.values() if isinstance(value, list)]
        found = lists[0] if len(lists) == 1 else found
    if not isinstance(found, list):
        raise SvdtuneError(f"{path} holds one JSON {type(found).__name__}; expected a list of objects")
    for i, row in enumerate(found, 1):
        yield _object(row, f"row {i}")


def _scan_jsonl(text: str, path: Path) -> Iterator[Located | Fault]:
    # not splitlines: JSON strings may hold U+2028
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = _parse(line)
        except json.JSONDecodeError as error:
            hint = ""
            if text.lstrip().startswith("["):
                hint = "; a list of objects is JSON: rename it to .json"
            elif line.rstrip().endswith("},"):
                hint = "; take out the comma behind the object"
            yield Fault(f"line {number}", f"is not valid JSON: {error.msg} at column {error.colno}{hint}")
        except _Unusable as error:
            yield Fault(f"line {number}", str(error))
        else:
            yield _object(row, f"line {number}")


class _Unusable(Exception):
    """JSON that parses but cannot be meant, or cannot be held: the end of a sentence that starts
    with its place."""


def _parse(text: str) -> Any:
    """Parse JSON; nothing in it is dropped or changed without a word."""
    try:
        found = json.loads(text, object_pairs_hook=_once_each)
    except RecursionError as error:
        raise _Unusable("holds values too deep in each other; flatten them") from error
    except json.JSONDecodeError:
        raise
    except ValueError as error:  # of int(): thousands of digits
        raise _Unusable("holds a number of thousands of digits; put it in quotes as a text") from error
    if _SURROGATE.search(text):
        try:
            json.dumps(found, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise _Unusable("holds half a character (a lone \\ud800 to \\udfff); take it out") from error
    return found


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise _Unusable(f"has the field {twice!r} twice; keep one of them")
    return found


def _object(row: Any, place: str) -> Located | Fault:
    if isinstance(row, dict):
        return Located(place, row)
    return Fault(place, f"is {row!r:.60}; expected an object with named fields")


def _scan_csv(text: str, path: Path) -> Iterator[Located | Fault]:
    csv.field_size_limit(max(csv.field_size_limit(), len(text) + 1))  # a long text is no fault
    before = _BEFORE.match(text)
    assert before is not None
    text, skipped = text[before.end() :], sum(1 for _ in io.StringIO(before[0], newline=""))
    header = _RECORD.match(text)
    assert header is not None
    signs = _QUOTED.sub("", header[0])
    usual = "\t" if kind(path) == ".tsv" else ","
    # where a comma is the decimal sign, spreadsheets write semicolons
    between = before[1] or next((sign for sign in (usual, *";\t,") if sign in signs), usual)
    table = partial(_scan_table, text, path, skipped, between)
    quoted = table(csv.QUOTE_MINIMAL)
    if between != "\t" or '"' not in text or signs != header[0]:
        return quoted
    # Between tabs many programs quote nothing, so that a cell may begin with a quote sign.
    plain = list(table(csv.QUOTE_NONE))
    try:
        rows = list(quoted)
    except SvdtuneError:
        return iter(plain)
    return iter(min(rows, plain, key=lambda found: sum(isinstance(one, Fault) for one in found)))


def _scan_table(text: str, path: Path, skipped: int, between: str, quoting: Literal[0, 3]) -> Iterator[Located | Fault]:
    """The rows of a table below its header, which stands under so many skipped lines."""
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True, delimiter=between, quoting=quoting)
    try:
        names = list(reader.fieldnames or ())
        if twice := [name for name in names if names.count(name) > 1]:
            raise SvdtuneError(f"{path} has two columns of the name {twice[0]!r}; rename one of them")
        for row in reader:
            place = f"line {skipped + reader.line_num}"
            if None in row or None in row.values():
                yield Fault(place, f"does not have the {len(names)} columns of the header")
            else:
                yield Located(place, row)
    except csv.Error as error:
        raise SvdtuneError(
            f"{path} is not valid {kind(path)[1:].upper()} after line {skipped + reader.line_num}: {error}"
        ) from error


def _scan_text(text: str, path: Path) -> Iterator[Located | Fault]:
    """Plain text: a row for each line that is not blank, with a field `text`, as `datasets` has
    it."""
    lines = enumerate(text.split("\n"), 1)
    return (Located(f"line {number}", {"text": line.rstrip("\r")}) for number, line in lines if line.strip())


def _scan_parquet(path: Path) -> Iterator[Located]:
    with needs(f"reading {path} needs pyarrow", "parquet"):
        from pyarrow import ArrowException, parquet
    try:
        rows = parquet.read_table(path).to_pylist()
    except (ArrowException, OSError, ValueError, OverflowError) as error:
        raise SvdtuneError(f"{path} is not a readable Parquet file: {error}") from error
    return (Located(f"row {i}", row) for i, row in enumerate(rows, 1))
