"""`svdtune report`: one page about one or several runs, and its figures as files."""

from pathlib import Path
from typing import Annotated

import typer

from svdtune.cli.outcome import for_json

app = typer.Typer()


@app.command()
def report(
    runs: Annotated[list[str], typer.Argument(help="Run folders of `svdtune train`.", show_default=False)],
    output: Annotated[
        Path | None, typer.Option(help="The page; RUN/report.html of the first run by default.", show_default=False)
    ] = None,
    figures: Annotated[
        Path | None, typer.Option(help="Also write every figure as SVG and its numbers as CSV into this folder.")
    ] = None,
    title: Annotated[str | None, typer.Option(help="Title of the page.")] = None,
) -> None:
    """Write one HTML file that tells what happened in some runs.

    It opens from disk, needs no network, and says which parts the runs have no files for: scores
    come from `svdtune evaluate`, spectra, changes and routing from `svdtune analyze`. What changed
    also goes into each adapter's model card.

    Examples:

    svdtune report runs/sorsa

    svdtune report runs/sorsa runs/lora runs/full --output comparison.html --figures figures
    """
    from svdtune.reports import report as write

    written = write(runs, output, title=title, figures=figures)
    for_json(written)
    typer.echo(written.headline)
    for run, missing in written.missing.items():
        for part in missing:
            typer.echo(f"{run} lacks {part}")
    typer.echo(f"page: {written.page} ({written.page.stat().st_size / 1e6:.2f} MB)")
    if figures is not None:
        typer.echo(f"figures: {len(written.figures)} files in {figures}")
