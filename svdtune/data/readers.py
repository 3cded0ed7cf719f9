"""Rows by the name of their source: a file, an offline generator, a data set that is known by name,
or one on the hub."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from svdtune.data import arithmetic
from svdtune.data.catalogue import CATALOGUE, data_folder
from svdtune.data.examples import check_fields
from svdtune.data.files import FILES, kind, read_file
from svdtune.data.shares import in_share
from svdtune.data.standard import without_nulls
from svdtune.errors import SvdtuneError
from svdtune.names import check_hub_name
from svdtune.registry import Registry
from svdtune.system import first_line, needs

Rows = list[dict[str, Any]]

GENERATORS: Registry[Callable[[str, int, int], Rows]] = Registry("data", {"arithmetic": arithmetic.rows})
_GENERATED = 1000  # rows of a generator when no limit is given


def read_rows(
    source: str | Path,
    split: str | None = None,
    *,
    config: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    only: float | None = None,
    without: float | None = None,
    fields: Sequence[str] = (),
) -> Rows:
    """Read all rows, or the first `limit`.

    Args:
        source: a path ending in .json, .jsonl, .csv, .tsv, .parquet or .txt (.gz may follow), the
            name of an offline generator ("arithmetic") or of a data set in
            `svdtune.data.catalogue`, or a data set's name on the hub.
        split: of anything but a file, "train" by default; files have none.
        config: the configuration of a hub data set ("main" of openai/gsm8k).
        limit: how many rows; a generator makes 1000 by default.
        seed: of a generator.
        only: only this share of them, drawn by what they ask (see `svdtune.data.shares`).
        without: all but this share; of one source, the same share is drawn every time.
        fields: fields every row must have.

    Raises:
        SvdtuneError: if there is no such source, it is malformed (the message names path and line),
            empty, or a row lacks one of `fields`.
    """
    name = str(source)
    if limit is not None and limit < 1:
        raise SvdtuneError(f"limit is {limit}; expected at least 1 row of {name}")
    if name in GENERATORS:
        rows = GENERATORS[name](split or "train", limit or _GENERATED, seed)
    elif name in CATALOGUE:
        rows = _read_named(name, split or "train")
    elif (path := Path(name).expanduser()).exists() or kind(path) in FILES:
        if split is not None or config is not None:
            raise SvdtuneError(f"{name} is a file, which has no split or config; remove them, or name another file")
        rows = read_file(path)
        if kind(path) == ".parquet":
            rows = [dict(without_nulls(row)) for row in rows]
    else:
        check_hub_name(name, "data", "a file, a generator, or a data set's name", [*GENERATORS, *CATALOGUE], "dataset")
        rows = _read_hub(name, config, split or "train")
    if not rows:
        raise SvdtuneError(f"{name} is empty: it has no rows")
    rows = rows[:limit]
    if only is not None:
        rows = [row for row, drawn in zip(rows, in_share(rows, only, name), strict=True) if drawn]
    if without is not None:
        rows = [row for row, drawn in zip(rows, in_share(rows, without, name), strict=True) if not drawn]
    for i, row in enumerate(rows, 1):
        check_fields(row, fields, f"{name} row {i}")
    return rows


def _read_named(name: str, split: str) -> Rows:
    dataset = CATALOGUE[name]
    rows = dataset.read(split)
    if rows is not None:
        return rows
    assert dataset.hub is not None
    try:
        rows = _read_hub(*dataset.hub, split)
    except SvdtuneError as error:
        raise SvdtuneError(
            f"{name} ({split}) is not in the data folder {data_folder()}, which would have it as {dataset.files[split][0]}, "
            f"and the hub does not give it: {error}"
        ) from error
    return dataset.convert(rows, split) if dataset.convert else rows


def _read_hub(name: str, config: str | None, split: str) -> Rows:
    listed = GENERATORS.listed()
    with needs(f"{name!r} is no file and no generator ({listed}); if it is a data set's name on the hub", "hub"):
        import datasets
    try:
        return [dict(without_nulls(row)) for row in datasets.load_dataset(name, config, split=split)]
    except Exception as error:  # datasets raises a dozen unrelated types, some of them not its own
        raise SvdtuneError(
            f"{name!r} is no file, no generator ({listed}), and could not be loaded from the hub: {first_line(error)}"
        ) from error
