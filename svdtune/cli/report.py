"""`svdtune report`: one page about one or several runs, and its figures as files."""

from pathlib import Path
from typing import Annotated

import typer

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
    from svdtune.analysis import read_facts
    from svdtune.reports import add_analysis, gather, render
    from svdtune.system import explain_write_errors, replace_text
    from svdtune.training.folder import ADAPTER, REPORT

    facts = [read_facts(run) for run in dict.fromkeys(runs)]
    data = gather(facts, title)
    page = output or Path(runs[0]).expanduser() / REPORT
    with explain_write_errors(page):
        page.parent.mkdir(parents=True, exist_ok=True)
        replace_text(page, render(data))
    for one in facts:
        adapter = Path(one["folder"]).expanduser() / ADAPTER
        if adapter.is_dir():
            add_analysis(adapter, gather([one]))
    typer.echo(data["headline"])
    for run in data["runs"]:
        for part in run["missing"]:
            typer.echo(f"{run['name']} lacks {part}")
    typer.echo(f"page: {page} ({page.stat().st_size / 1e6:.2f} MB)")
    if figures is not None:
        from svdtune.reports import write_figures

        written = write_figures(data, figures)
        typer.echo(f"figures: {len(written)} files in {figures}")
