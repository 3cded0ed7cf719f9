"""`svdtune data`: what a data file is, and which data sets of the papers are at hand."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from svdtune.cli.outcome import for_json

if TYPE_CHECKING:
    from svdtune.data.check import Checked

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Look at data before training on it.")


@app.command()
def check(
    paths: Annotated[list[Path], typer.Argument(metavar="PATH...", help="Files, or folders of them.")],
    show: Annotated[int, typer.Option(min=0, help="How many malformed rows to list of each file.")] = 10,
) -> None:
    """Say what each file is, how many rows it has, what is malformed, and what is there twice.

    Exit code 0: every row of every file can be used. 1: some rows are malformed. 2: a file cannot
    be read at all.

    \b
    svdtune data check train.jsonl
    svdtune data check data/
    """
    from svdtune.data.check import check_file
    from svdtune.errors import SvdtuneError

    worst = 0
    files: dict[str, Any] = {}
    for path in _files(paths):
        try:
            found = check_file(path)
        except SvdtuneError as error:
            typer.echo(f"{error}")
            files[str(path)] = {"unreadable": str(error)}
            worst = 2
            continue
        files[str(path)] = vars(found) | {"format": found.format.name if found.format else None}
        typer.echo(_report(found, show))
        worst = max(worst, 1 if found.faults or not found.rows else 0)
    for_json(files)
    raise typer.Exit(worst)


@app.command("list")
def list_() -> None:
    """List the papers' data sets: their splits, where each was found, and how to get those that are
    missing."""
    from svdtune.data.catalogue import CATALOGUE, GROUPS, data_folder
    from svdtune.registry import lab_note

    for_json({"folder": data_folder(), "sets": list(CATALOGUE), "groups": dict(GROUPS)})
    typer.echo(f"data folder: {data_folder()} (SVDTUNE_DATA names another)")
    if not CATALOGUE:
        typer.echo(f"no data set is known by name{lab_note()}")
    for dataset in CATALOGUE.values():
        found = {split: dataset.find(split) for split in dataset.files}
        missing = f"from the hub ({dataset.hub[0]})" if dataset.hub else f"missing: {dataset.where}"
        places = "; ".join(f"{split}: {path or missing}" for split, path in found.items())
        made = f"; made of them: {', '.join(dataset.made)}" if dataset.made else ""
        typer.echo(f"{dataset.name:17} {places}{made}")
    for name, members in GROUPS.items():
        typer.echo(f"{name:17} stands for {', '.join(members)} in evaluation")


def _files(paths: list[Path]) -> list[Path]:
    """The paths, folders replaced by the data files in them."""
    from svdtune.data.files import FILES, kind

    found: list[Path] = []
    for path in paths:
        inside = sorted(p for p in path.rglob("*") if p.is_file() and kind(p) in FILES) if path.is_dir() else [path]
        found += inside
    return found


def _report(found: "Checked", show: int) -> str:
    name = found.format.name if found.format else "no format of the papers"
    lines = [f"{found.path}: {name}, {_rows(found.rows)}"]
    if found.fields:
        lines.append(f"  fields: {', '.join(found.fields)}")
    if not found.rows:
        lines.append("  empty: there is nothing to train on or to ask")
    if found.repeated:
        lines.append(f"  {_rows(found.repeated)} equal to an earlier one")
    if found.format and found.format.references:
        lines.append(f"  {found.rows - found.same_question:,} meanings, each with one or more references")
    elif found.same_question > found.repeated:
        lines.append(
            f"  {_rows(found.same_question)} asking what an earlier one asks, but for case, spaces and punctuation"
        )
    if found.faults:
        lines.append(f"  {len(found.faults):,} malformed:")
        lines += [f"    {place} {reason}" for place, reason in found.faults[:show]]
        if len(found.faults) > show:
            lines.append(f"    and {len(found.faults) - show:,} more (--show)")
    return "\n".join(lines)


def _rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count:,} rows"
