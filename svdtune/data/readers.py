"""Rows from JSON, JSONL, CSV or Parquet files (also .gz), a data set's name on the hub, or an offline generator."""

import csv
import gzip
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from svdtune.data import arithmetic, gsm_symbolic
from svdtune.data.examples import check_fields
from svdtune.errors import SvdtuneError

Rows = list[dict[str, Any]]

GENERATORS = {"arithmetic": arithmetic.rows, "gsm_symbolic": gsm_symbolic.rows}
_FILES = (".json", ".jsonl", ".csv", ".parquet")
_GENERATED = 1000  # rows of a generator when no limit is given


def read_rows(
    source: str | Path,
    split: str | None = None,
    *,
    config: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    fields: Sequence[str] = (),
) -> Rows:
    """Read all rows, or the first `limit`.

    Args:
        source: a path ending in .json, .jsonl, .csv or .parquet (.gz may follow), the name of an offline generator
            ("arithmetic", "gsm_symbolic"), or a data set's name on the hub.
        split: of a generator or a hub data set, "train" by default; files have none.
        config: the configuration of a hub data set ("main" of openai/gsm8k).
        limit: how many rows; a generator makes 1000 by default.
        seed: of a generator.
        fields: fields every row must have.

    Raises:
        SvdtuneError: if there is no such source, it is malformed (the message names path and line), empty, or a row
            lacks one of `fields`.
    """
    name = str(source)
    if limit is not None and limit < 1:
        raise SvdtuneError(f"limit is {limit}; expected at least 1 row of {name}")
    if name in GENERATORS:
        rows = GENERATORS[name](split or "train", limit or _GENERATED, seed)
    elif (path := Path(name).expanduser()).exists() or _kind(path) in _FILES:
        if split is not None or config is not None:
            raise SvdtuneError(f"{name} is a file, which has no split or config; remove them, or name another file")
        rows = _read_file(path)
    else:
        rows = _read_hub(name, config, split or "train")
    if not rows:
        raise SvdtuneError(f"{name} is empty: it has no rows")
    rows = rows[:limit]
    for i, row in enumerate(rows, 1):
        check_fields(row, fields, f"{name} row {i}")
    return rows


def _kind(path: Path) -> str:
    return path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix


def _read_file(path: Path) -> Rows:
    if not path.is_file():
        raise SvdtuneError(f"there is no file {path}")
    kind = _kind(path)
    if kind == ".parquet":
        return _read_parquet(path)
    if kind not in _FILES:
        raise SvdtuneError(
            f"{path}: cannot tell its format; expected a name ending in {', '.join(_FILES)} or one with .gz"
        )
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        text = raw.decode("utf-8-sig")
    except (gzip.BadGzipFile, EOFError) as error:
        raise SvdtuneError(f"{path} is not a whole gzip file: {error}") from error
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise SvdtuneError(f"{path} line {line} is not UTF-8; convert the file to UTF-8") from error
    if kind == ".json":
        return _read_json(text, path)
    return list(_read_jsonl(text, path) if kind == ".jsonl" else _read_csv(text, path))


def _read_json(text: str, path: Path) -> Rows:
    try:
        found = json.loads(text) if text.strip() else []
    except json.JSONDecodeError as error:
        hint = "; one object a line is JSONL: rename it to .jsonl" if error.msg == "Extra data" else ""
        raise SvdtuneError(f"{path} line {error.lineno} is not valid JSON: {error.msg}{hint}") from error
    if isinstance(found, dict):
        lists = [value for value in found.values() if isinstance(value, list)]
        found = lists[0] if len(lists) == 1 else found
    if not isinstance(found, list):
        raise SvdtuneError(f"{path} holds one JSON {type(found).__name__}; expected a list of objects")
    for i, row in enumerate(found, 1):
        if not isinstance(row, dict):
            raise SvdtuneError(f"{path} row {i} is {row!r:.60}; expected an object with named fields")
    return found


def _read_jsonl(text: str, path: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: JSON strings may hold U+2028
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise SvdtuneError(
                f"{path} line {number} is not valid JSON: {error.msg} at column {error.colno}"
            ) from error
        if not isinstance(row, dict):
            raise SvdtuneError(f"{path} line {number} is {row!r:.60}; expected an object with named fields")
        yield row


def _read_csv(text: str, path: Path) -> Iterator[dict[str, Any]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        for row in reader:
            if None in row or None in row.values():
                raise SvdtuneError(
                    f"{path} line {reader.line_num} does not have the {len(reader.fieldnames or ())} columns of the header"
                )
            yield row
    except csv.Error as error:
        raise SvdtuneError(f"{path} is not valid CSV after line {reader.line_num}: {error}") from error


def _read_parquet(path: Path) -> Rows:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise SvdtuneError(f"reading {path} needs pyarrow: pip install 'svdtune[parquet]'") from error
    try:
        return parquet.read_table(path).to_pylist()
    except (ArrowException, OSError) as error:
        raise SvdtuneError(f"{path} is not a readable Parquet file: {error}") from error


def _read_hub(name: str, config: str | None, split: str) -> Rows:
    try:
        import datasets
    except ImportError as error:
        raise SvdtuneError(
            f"{name!r} is no file and no generator ({', '.join(GENERATORS)}); "
            f"if it is a data set's name on the hub: pip install 'svdtune[hub]'"
        ) from error
    try:
        return list(datasets.load_dataset(name, config, split=split))
    except Exception as error:  # datasets raises a dozen unrelated types, some of them not its own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise SvdtuneError(
            f"{name!r} is no file, no generator ({', '.join(GENERATORS)}), and could not be loaded from the hub: {reason}"
        ) from error
