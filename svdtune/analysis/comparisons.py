"""Comparisons over several runs: a score against trained parameters, threshold, heads, layers or
scale (SARA, Fig. 2–6, 9)."""

from collections.abc import Sequence
from typing import Any, TypedDict

from svdtune.analysis.facts import AVERAGE, Facts

_AXES = {
    "parameters": ("trained parameters", "Score against trained parameters", "SARA, Figure 4"),
    "threshold": ("threshold θ", "Threshold sweep", "SARA, Figure 5"),
    "heads": ("heads", "Number of parallel heads", "SARA, Figure 6"),
    "layers": ("adapted layers", "Groups of layers", "SARA, Figures 2 and 3"),
    "scale": ("scale α / r", "LoRA's scale", "SARA, Figure 9"),
}


class Point(TypedDict):
    """A run in a comparison: where it lies, its score there, and the score's 95 % interval."""

    run: str
    method: str
    x: float
    label: str
    y: float
    low: float | None
    high: float | None


class Comparison(TypedDict):
    """One figure: by which setting, under which score, and the runs that have both, ordered by the
    setting."""

    by: str
    title: str
    axis: str
    source: str
    score: str
    points: list[Point]


def comparisons(runs: Sequence[Facts]) -> list[Comparison]:
    """Every comparison that the runs allow: at least two runs have the score, and one method two
    values of the setting."""
    labels = list(dict.fromkeys(label for run in runs for label in run["scores"]))
    labels.sort(key=lambda label: not label.startswith(AVERAGE))
    found = []
    for by, (axis, title, source) in _AXES.items():
        for label in labels:
            points = [point for run in runs if (point := _point(run, by, label))]
            points.sort(key=lambda point: (point["x"], point["run"]))
            if _compares(points, by):
                found.append(Comparison(by=by, title=title, axis=axis, source=source, score=label, points=points))
    return found


def _compares(points: Sequence[Point], by: str) -> bool:
    if by == "parameters":
        return len(points) > 1
    methods = {point["method"] for point in points}
    return any(len({p["x"] for p in points if p["method"] == method}) > 1 for method in methods)


def _point(run: Facts, by: str, label: str) -> Point | None:
    score = run["scores"].get(label)
    value: Any = run["summary"].get("trained_parameters") if by == "parameters" else run["settings"][by]
    if score is None or value is None:
        return None
    text = f"{value[0]}–{value[1]}" if by == "layers" else f"{value:,}" if by == "parameters" else f"{value:g}"
    return Point(
        run=run["name"],
        method=run["method"],
        x=float(value[0] if by == "layers" else value),
        label=text,
        y=score["value"],
        low=score["low"],
        high=score["high"],
    )
