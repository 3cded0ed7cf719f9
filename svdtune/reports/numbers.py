"""The numbers of each figure, from the page's data: the same that the page draws with everything
switched on."""

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

MEASURES = {
    "relative_change": "relative change ‖ΔW‖/‖W‖",
    "delta_d": "ΔD",
    "delta_sigma": "ΔΣ",
    "angle": "subspace angle, degrees",
    "condition": "condition number of W_p",
    "orthonormality": "‖MᵀM − I‖ of U and V",
}


@dataclass(frozen=True)
class Series:
    """One line or set of points; `spread` has the 95 % interval of each y, or is empty."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    spread: Sequence[tuple[float, float]] = ()


@dataclass(frozen=True)
class Lines:
    """A figure of lines, or of points that are not joined; a spread is shown as error bars, or as a
    `band`."""

    name: str
    title: str
    x: str
    y: str
    series: Sequence[Series]
    log: str = ""
    joined: bool = True
    ticks: dict[float, str] = field(default_factory=dict)
    band: bool = False

    @property
    def xs(self) -> list[float]:
        """Where there are values."""
        return [x for one in self.series for x in one.x]

    @property
    def ys(self) -> list[float]:
        """The values."""
        return [y for one in self.series for y in one.y]


@dataclass(frozen=True)
class Grid:
    """A heat map: values [row][column], None where there is none."""

    name: str
    title: str
    rows: Sequence[str]
    columns: Sequence[str]
    axes: tuple[str, str]
    measure: str
    values: Sequence[Sequence[float | None]]


Numbers = Lines | Grid


def all_numbers(data: dict[str, Any]) -> Iterator[Numbers]:
    """Every figure that the data allows, in the page's order; those with choices once for each
    choice."""
    yield from _comparisons(data)
    yield from _during(data)
    yield from _after(data)
    yield from _before(data)
    yield from _routing(data)


def as_csv(numbers: Numbers) -> str:
    """A figure's numbers as CSV, one line a point or cell, every digit kept."""
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    if isinstance(numbers, Grid):
        lines.writerow([*numbers.axes, numbers.measure])
        for row, values in zip(numbers.rows, numbers.values, strict=True):
            lines.writerows([row, column, value] for column, value in zip(numbers.columns, values, strict=True))
        return text.getvalue()
    lines.writerow(["series", numbers.x, numbers.y, "low", "high"])
    for one in numbers.series:
        spread: Sequence[tuple[Any, Any]] = one.spread or [("", "")] * len(one.x)
        lines.writerows([one.name, x, y, *ends] for x, y, ends in zip(one.x, one.y, spread, strict=True))
    return text.getvalue()


def _line(name: str, pairs: Sequence[tuple[float | None, float | None]]) -> Series | None:
    """A series of the pairs that have both values; None if none has."""
    known = [(x, y) for x, y in pairs if x is not None and y is not None]
    return Series(name, *zip(*known, strict=True)) if known else None


def _lines(name: str, title: str, x: str, y: str, series: Sequence[Series | None], log: str = "") -> Iterator[Lines]:
    known = [one for one in series if one is not None]
    if known:
        yield Lines(name, title, x, y, known, log)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def _comparisons(data: dict[str, Any]) -> Iterator[Numbers]:
    for i, one in enumerate(data["comparisons"]):
        series = []
        for run in data["runs"]:
            points = [point for point in one["points"] if point["run"] == run["name"]]
            if points:
                spread = [(p["low"], p["high"]) for p in points if p["low"] is not None]
                series.append(Series(run["name"], [p["x"] for p in points], [p["y"] for p in points], spread))
        ticks = {} if one["by"] == "parameters" else {point["x"]: point["label"] for point in one["points"]}
        log = "x" if one["by"] == "parameters" else ""
        name = f"by-{one['by']}-{i}"
        yield Lines(name, one["title"], one["axis"], one["score"], series, log, False, ticks)


def _during(data: dict[str, Any]) -> Iterator[Numbers]:
    for key, title in (("loss", "Training loss"), ("grad_norm", "Gradient norm")):
        logged = [run for run in data["runs"] if key in run["log"]]
        series = [_line(run["name"], list(zip(run["log"]["step"], run["log"][key], strict=True))) for run in logged]
        log = "y" if key == "grad_norm" else ""
        yield from _lines(key.replace("_", "-"), title, "step", title.lower(), series, log)
    sampled = [(run["name"], run["during"]) for run in data["runs"] if run["during"]]

    def means(found: dict[str, Any], measure: str) -> list[float | None]:
        return [_mean(row) for row in found["values"][measure]]

    for measure, label in MEASURES.items():
        series = [_line(name, list(zip(found["steps"], means(found, measure), strict=True))) for name, found in sampled]
        log = "y" if measure == "condition" else ""
        yield from _lines(f"movement-{measure}", "How far the weights moved", "step", label, series, log)
    paths = [
        _line(name, list(zip(means(found, "delta_sigma"), means(found, "delta_d"), strict=True)))
        for name, found in sampled
    ]
    yield from _lines("delta", "ΔD against ΔΣ", "ΔΣ", "ΔD", paths)
    for name, found in sampled:
        by_layer = [zip(*found["values"][measure], strict=True) for measure in ("delta_sigma", "delta_d")]
        paths = [
            _line(layer, list(zip(sigma, turn, strict=True)))
            for layer, sigma, turn in zip(found["layers"], *by_layer, strict=True)
        ]
        title = f"{name}: ΔD against ΔΣ of each layer"
        yield from _lines(f"delta-layers-{name}", title, "ΔΣ", "ΔD", paths)


def _after(data: dict[str, Any]) -> Iterator[Numbers]:
    runs = [(run["name"], run["after"]["layers"]) for run in data["runs"] if run["after"]]
    for name, layers in runs:
        for measure in ("relative_change", "delta_d", "angle"):
            title = f"{name}: which layers moved"
            values = {layer: found[measure] for layer, found in layers.items()}
            yield _by_depth(data, f"moved-{measure}-{name}", title, MEASURES[measure], values)
    series = [_line(name, _energy(list(layers.values()))) for name, layers in runs]
    x, y = "leading singular directions of the base", "share of ‖ΔW‖²"
    yield from _lines("energy", "Where the change lies in the base weight", x, y, series, "x")
    series = [_line(name, _change(list(layers.values()))) for name, layers in runs]
    yield from _lines("change-spectrum", "Spectrum of the change", "index", "σ_i / Σσ", series, "y")


def _energy(layers: Sequence[dict[str, Any]]) -> list[tuple[float, float | None]]:
    """Mean share by count; beyond its last direction a small layer keeps the share it has there."""
    found = [layer["energy"] for layer in layers if layer["energy"]]
    counts = sorted({count for energy in found for count in energy["count"]})

    def share(energy: dict[str, Any], count: int) -> float:
        at = max(i for i, known in enumerate(energy["count"]) if known <= count)
        return (energy["left"][at] + energy["right"][at]) / 2

    return [(count, _mean([share(energy, count) for energy in found])) for count in counts]


def _change(layers: Sequence[dict[str, Any]]) -> list[tuple[float, float | None]]:
    deltas = [layer["delta"] for layer in layers if layer["delta"]["sum"]]
    longest = max((len(delta["values"]) for delta in deltas), default=0)

    def at(delta: dict[str, Any], i: int) -> float:
        return (delta["values"][i] if i < len(delta["values"]) else 0.0) / delta["sum"]

    pairs = [(i + 1, _mean([at(delta, i) for delta in deltas])) for i in range(longest)]
    return [(i, value) for i, value in pairs if value]


def _before(data: dict[str, Any]) -> Iterator[Numbers]:
    found = next((run["before"] for run in data["runs"] if run["before"]), None)
    if found is None:
        return
    thresholds, layers = found["thresholds"], found["layers"]
    place = {layer["name"]: layer for layer in data["layers"]}
    for kind in dict.fromkeys(place[name]["kind"] for name in layers):
        names = sorted((name for name in layers if place[name]["kind"] == kind), key=lambda name: place[name]["depth"])
        ranks = [
            _line(f"θ = {threshold:g}", [(place[name]["depth"], layers[name]["k"][t]) for name in names])
            for t, threshold in enumerate(thresholds)
        ]
        yield from _lines(f"ranks-{kind}", f"{kind}: rank at thresholds", "layer", "rank k", ranks)
        spectra = [_line(f"layer {place[name]['depth']}", layers[name]["values"]) for name in names]
        yield from _lines(f"spectra-{kind}", f"{kind}: singular values", "index", "σ", spectra, "xy")
    for t, threshold in enumerate(thresholds):
        cost = {name: layer["k"][t] * (layer["in"] + layer["out"] + 1) for name, layer in layers.items()}
        shares = {name: value / sum(cost.values()) for name, value in cost.items()}
        title = f"How θ = {threshold:g} spends SARA's parameters"
        yield _by_depth(data, f"budget-{threshold:g}", title, "share of all", shares)


def _routing(data: dict[str, Any]) -> Iterator[Numbers]:
    place = {layer["name"]: layer for layer in data["layers"]}
    for run in data["runs"]:
        heads = [str(i + 1) for i in range((run["routing"] or {}).get("heads", 0))]
        for task, found in (run["routing"] or {}).get("tasks", {}).items():
            for kind in dict.fromkeys(place[name]["kind"] for name in found["layers"]):
                names = [name for name in found["layers"] if place[name]["kind"] == kind]
                title = f"{run['name']}, {task}, {kind}: mean gate"
                rows = [str(place[name]["depth"]) for name in names]
                gates = [found["layers"][name]["gate"] for name in names]
                name = f"routing-{run['name']}-{task}-{kind}"
                yield Grid(name, title, rows, heads, ("layer", "head"), "mean gate", gates)


def _by_depth(data: dict[str, Any], name: str, title: str, measure: str, values: dict[str, Any]) -> Grid:
    place = {(layer["kind"], layer["depth"]): layer["name"] for layer in data["layers"] if layer["name"] in values}
    kinds = list(dict.fromkeys(kind for kind, _ in place))
    depths = sorted({depth for _, depth in place})
    cells = [[values.get(place.get((kind, depth), "")) for depth in depths] for kind in kinds]
    return Grid(name, title, kinds, [str(depth) for depth in depths], ("module", "layer"), measure, cells)
