"""`svdtune study`: many runs that answer one question, and the page that says what came out."""

import shlex
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from svdtune.cli.outcome import for_json
from svdtune.errors import SvdtuneError

if TYPE_CHECKING:
    from svdtune.lab.study.records import KnownRuns
    from svdtune.lab.study.spec import Settings, Study

app = typer.Typer()

TAKEN = ("data", "jobs", "logs", "records", "runs")
"""Folders that the runs of all studies share."""


@app.command()
def study(
    files: Annotated[
        list[Path],
        typer.Argument(metavar="STUDY...", help="Study files, or names of svdtune's own.", show_default=False),
    ],
    output: Annotated[Path, typer.Option(help="Folder for runs, records and results.")] = Path("runs/studies"),
    per_gpu: Annotated[int, typer.Option(min=1, help="Runs at a time on each GPU (without one: on the CPU).")] = 1,
    eval_batch_size: Annotated[int, typer.Option(min=1, help="Completions generated together.")] = 64,
    retry: Annotated[bool, typer.Option("--retry", help="Make failed runs again.")] = False,
    drop_weights: Annotated[bool, typer.Option("--drop-weights", help="Keep no adapter of a scored run.")] = False,
    minutes: Annotated[
        float | None, typer.Option(min=0, help="Start no run after so many minutes.", show_default=False)
    ] = None,
    published: Annotated[
        Path | None,
        typer.Option(help="Folder of published studies; their runs are not made again.", show_default=False),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be run, and stop.")] = False,
) -> None:
    """Compare methods: matched in trained parameters, tuned alike, repeated over seeds.

    Every run is a run folder like any other. After an interruption, a full disk or a kill the same
    command goes on: finished runs are never made again. Studies that share an output folder share
    the runs that they have in common.

    \b
    svdtune study small/math --dry-run
    svdtune study small/math
    svdtune study studies/small/*.yaml --per-gpu 6 --drop-weights
    """
    from svdtune.lab.study.page import write_page
    from svdtune.lab.study.records import KnownRuns
    from svdtune.lab.study.results import read_results
    from svdtune.lab.study.runner import How, devices, run_studies
    from svdtune.lab.study.spec import load_study
    from svdtune.system import open_console

    _check_names(files)
    studies = {path.stem: load_study(path) for path in files}
    tell = partial(open_console(stderr=True).print, markup=False, highlight=False, soft_wrap=True)
    if dry_run:
        _describe(studies, output, KnownRuns(output, published, retry))
        return
    import torch

    processes, gpus = devices(per_gpu, torch.cuda.device_count())
    command = shlex.join(["svdtune", *sys.argv[1:]])
    how = How(processes, gpus, eval_batch_size, retry, drop_weights, command, minutes, published)
    for results in run_studies(studies, output, how, tell):
        write_page(results, results.parent)
        typer.echo(f"results: {results.parent / 'README.md'}")
        runs = read_results(results).runs
        for_json({"study": results.parent.name, "results": results, "page": results.parent / "README.md"})
        if failed := sum(run.status == "failed" for run in runs):
            typer.echo(f"{failed} of {len(runs)} runs failed; the page says why, and --retry makes them again")


def _check_names(files: list[Path]) -> None:
    """Refuse two studies of one name, and one named as a folder of runs: results lie in a folder of
    the study's name."""
    names = [path.stem for path in files]
    for path, name in zip(files, names, strict=True):
        if names.count(name) > 1:
            raise SvdtuneError(f"two study files are called {name}, and their results would mix; rename one of them")
        if name in TAKEN:
            raise SvdtuneError(
                f"{path}: {name} is what a folder beside the results is called; name the study otherwise"
            )


def _describe(studies: "dict[str, tuple[Study, dict[str, Settings]]]", output: Path, known: "KnownRuns") -> None:
    """Print every arm with its method, how many runs it takes, and what became of those that were
    made."""
    from svdtune.lab.study.progress import take_up
    from svdtune.lab.study.runner import planned

    making = planned(studies, output)
    for_json({one.name: {"title": one.study.title, "cells": len(one.cells)} for one in making})
    take_up(making, known.find)
    for one in making:
        typer.echo(f"{one.name}: {one.study.title}")
        runs = done = failed = 0
        for cell in one.cells:
            search, finals = cell.search(), one.finals(cell)
            made = one.made(cell)
            size = "" if cell.budget is None else f" at {cell.budget:,} parameters"
            method = "untrained" if cell.spec.untrained else _words(finals[0].recipe["method"])
            typer.echo(f"  {cell.task} · {cell.arm}{size}: {method}; {len(search)} + {len(finals)} runs{_made(*made)}")
            runs, done, failed = runs + len(search) + len(finals), done + made[0], failed + made[1]
        searching = one.study.tune and one.study.tune.extend and any(map(one.search, one.cells))
        more = ", more where a search is extended" if searching else ""
        typer.echo(f"  {runs} runs{_made(done, failed)}{more}")


def _made(done: int, failed: int) -> str:
    return (f", {done} done" if done else "") + (f", {failed} failed (--retry makes them again)" if failed else "")


def _words(method: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in method.items() if not isinstance(value, dict))
