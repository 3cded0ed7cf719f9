"""The section of a run's model card that says what changed: a table by kind of module, and the key
figure."""

from pathlib import Path
from statistics import fmean
from typing import Any

from svdtune.errors import SvdtuneError
from svdtune.methods.files.card import add_section
from svdtune.reports.figures import draw, save
from svdtune.reports.gather import kind_of
from svdtune.reports.numbers import Grid, all_numbers

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
