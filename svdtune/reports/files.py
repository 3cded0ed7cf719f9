"""Report on runs: the page, the sections of the adapters' cards, and the figures as files.

The page is one HTML file that holds its style, its code and its numbers, and asks the network for
nothing.
"""

import html
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from statistics import fmean
from typing import Any

from svdtune.analysis import read_facts
from svdtune.errors import SvdtuneError
from svdtune.methods.files.card import add_section
from svdtune.reports.figures import draw, save, write_figures
from svdtune.reports.gather import gather, kind_of
from svdtune.reports.numbers import Grid, all_numbers
from svdtune.system import plain, write_text
from svdtune.training.folder import ADAPTER, REPORT


@dataclass(frozen=True)
class Report:
    """What was written.

    Attributes:
        page: the HTML file.
        headline: the result in a sentence or two.
        missing: by run, what it has no files for, with the command that makes it.
        figures: the files of the figures, SVG and CSV; empty where none were asked for.
    """

    page: Path
    headline: str
    missing: dict[str, list[str]]
    figures: list[Path]


def report(
    runs: str | Path | Sequence[str | Path],
    output: str | Path | None = None,
    *,
    title: str | None = None,
    figures: str | Path | None = None,
) -> Report:
    """Write one HTML file that tells what happened in some runs. It opens from disk and needs no
    network. What changed also goes into each adapter's model card.

    Args:
        runs: a run folder, or several to compare; one that is named twice counts once.
        output: the page; RUN/report.html of the first run by default.
        title: of the page; the runs' names by default.
        figures: a folder for every figure as SVG and its numbers as CSV
            (`pip install 'svdtune[plots]'`).

    Returns:
        `page`, the file; `headline`, the result in a sentence or two; `missing`, by run what it has
        no files for; `figures`, their files.

    Raises:
        SvdtuneError: a folder is no run, matplotlib is missing for figures, or a file cannot be
            written.
    """
    runs = [runs] if isinstance(runs, str | Path) else runs
    if not runs:
        raise SvdtuneError("there are no runs to report on; name at least one run folder")
    facts = [read_facts(run) for run in dict.fromkeys(map(str, runs))]
    data = gather(facts, title)
    page = Path(output).expanduser() if output is not None else Path(runs[0]).expanduser() / REPORT
    write_text(page, render(data))
    for one in facts:
        adapter = Path(one["folder"]).expanduser() / ADAPTER
        if adapter.is_dir():
            add_analysis(adapter, gather([one]))
    missing = {run["name"]: run["missing"] for run in data["runs"]}
    drawn = [] if figures is None else write_figures(data, Path(figures).expanduser())
    return Report(page, data["headline"], missing, drawn)


# In this order: each file uses what those before it define.
_SCRIPTS = ("dom.js", "chart.js", "frame.js", "sections.js", "page.js")


def render(data: dict[str, Any]) -> str:
    """The page of some data, from `gather`.

    Whatever the data holds (names of runs, data sets, modules) stays text: it travels as JSON in
    which no `<` or `&` is left, and the page's code only ever sets text, never markup.
    """
    folder = files("svdtune.reports") / "page"
    scripts = "\n".join((folder / name).read_text("utf-8") for name in _SCRIPTS)
    parts = {
        "title": html.escape(data["title"]),
        "css": (folder / "page.css").read_text("utf-8"),
        "js": scripts,
        "data": as_json(data),
    }
    # One pass: what a part holds is never looked through for the next.
    return re.sub(r"@(title|css|js|data)@", lambda found: parts[found[1]], (folder / "page.html").read_text("utf-8"))


def as_json(data: Any) -> str:
    """JSON that may stand inside a script element; numbers that JSON has no word for become
    null."""
    text = json.dumps(plain(data), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    escaped = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}
    return re.sub("[<>&\u2028\u2029]", lambda found: escaped[found[0]], text)


FIGURE = "analysis.svg"


def add_analysis(adapter: Path, data: dict[str, Any]) -> bool:
    """Bring the section "What changed" of an adapter's card up to date; the figure lies beside the
    card.

    Returns:
        Whether there is anything to show: `svdtune analyze` ran. Without matplotlib there is the
            table alone.
    """
    (run,) = data["runs"]
    if run["after"]:
        head, lines = (
            "| module | layers | relative change | ΔD | subspace angle |\n|---|---:|---:|---:|---:|",
            _changes(run),
        )
        wanted = "moved-relative_change"
    elif run["routing"]:
        head, lines = "| task | module | entropy (1: even) | dominating heads |\n|---|---|---:|---|", _routing(run)
        wanted = "routing-"
    else:
        return False
    figure = next(each for each in all_numbers(data) if isinstance(each, Grid) and each.name.startswith(wanted))
    body = "\n".join([head, *lines])
    try:
        save(draw(figure), adapter / FIGURE)
        body = f"![{figure.title}]({FIGURE})\n\n{body}"
    except SvdtuneError:
        (adapter / FIGURE).unlink(missing_ok=True)
    add_section(adapter, "What changed", f"{body}\n\nBy `svdtune analyze`; means over the layers of each kind.")
    return True


def _by_kind(layers: dict[str, Any]) -> dict[str, list[Any]]:
    kinds: dict[str, list[Any]] = {}
    for name, layer in layers.items():
        kinds.setdefault(kind_of(name), []).append(layer)
    return kinds


def _changes(run: dict[str, Any]) -> list[str]:
    def mean(layers: list[Any], measure: str) -> float:
        return fmean(layer[measure] for layer in layers)

    return [
        f"| {kind} | {len(layers)} | {mean(layers, 'relative_change'):.3%} | {mean(layers, 'delta_d'):.4f} "
        f"| {mean(layers, 'angle'):.2f}° |"
        for kind, layers in _by_kind(run["after"]["layers"]).items()
    ]


def _routing(run: dict[str, Any]) -> list[str]:
    lines = []
    for task, found in run["routing"]["tasks"].items():
        for kind, layers in _by_kind(found["layers"]).items():
            heads = ", ".join(str(head + 1) for head in sorted({layer["dominant"] for layer in layers}))
            entropy = fmean(layer["entropy"] for layer in layers)
            lines.append(f"| {task.replace('|', chr(92) + '|')} | {kind} | {entropy:.3f} | {heads} |")
    return lines
