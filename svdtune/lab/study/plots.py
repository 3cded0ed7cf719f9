"""A study's figures: scores, differences to the baseline, training loss and gradient norms,
movement, learning rates."""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from svdtune.evaluation.interval import Interval
from svdtune.lab.study.arms import Arm, Table
from svdtune.lab.study.results import Run
from svdtune.lab.study.table import title
from svdtune.reports.figures import draw, new_figure, save, style_of
from svdtune.reports.numbers import Lines, Series

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Points = Sequence[tuple[float | None, float | None]]

_ASIDE = 1.025
_GREY = "#50565e"


def figures(tables: Sequence[Table]) -> Iterator[tuple[str, str, "Figure"]]:
    """(name of the file without its ending, what it shows, the figure) of every figure that the
    numbers allow.

    Raises:
        SvdtuneError: matplotlib is not installed.
    """
    for task in dict.fromkeys(table.task for table in tables):
        of_task = [table for table in tables if table.task == task and not table.by_loss]
        if not of_task:
            continue
        if len(of_task) == 1:
            yield from _scores(of_task[0])
            continue
        for name, caption, figure in _lines([by_parameters(of_task)]):
            _add_untrained(figure, of_task[0])
            yield name, caption, figure
    for table in tables:
        yield from _differences(table)
        yield from _lines([losses(table), grad_norms(table), movement(table), search(table)])


def write_figures(drawn: Iterable[tuple[str, str, "Figure"]], folder: Path) -> list[tuple[str, str]]:
    """Write figures as SVG; (file name, what it shows) of each. The same numbers give the same
    files."""
    written: dict[str, str] = {}
    for name, caption, figure in drawn:
        while f"{name}.svg" in written:  # labels that differ only in what a file name cannot have
            name += "-"
        save(figure, folder / f"{name}.svg")
        written[f"{name}.svg"] = caption
    return list(written.items())


def by_parameters(tables: Sequence[Table]) -> Lines:
    """The main score of a task of several budgets against trained parameters, with Student's 95 %
    interval over seeds."""
    main, share = tables[0].main, tables[0].share
    series = []
    names = list(dict.fromkeys(arm.name for table in tables for arm in table.arms))
    for at, name in enumerate(names):
        arms = [arm for table in tables for arm in table.arms if arm.name == name and main in arm.cells and arm.trained]
        # an arm without a budget is in every table
        points = {arm.trained: arm.cells[main] for arm in arms}
        if points:
            y = [scaled(cell.mean, share) for cell in points.values()]
            spread = [_ends(cell.mean, cell.interval, share) for cell in points.values()]
            # arms of one budget would hide each other
            aside = _ASIDE ** (at - (len(names) - 1) / 2)
            series.append(Series(label_of(name), [count * aside for count in points], y, spread))
    y_label = f"{main}, %" if share else main
    name = f"{tables[0].task}: {main} by trained parameters"
    file = file_of("score", tables[0].task)
    x = "trained parameters (points moved apart)"
    sizes = [table.budget for table in tables if table.budget] + [
        arm.trained for t in tables for arm in t.arms if arm.trained
    ]
    ticks = ticks_at(sizes, size_text)
    return Lines(file, label_of(name), x, label_of(y_label), series, "x", ticks=ticks)


def losses(table: Table) -> Lines:
    """Training loss by step: the mean over the finished seeds, and their range as a band."""
    return _by_step(table, "loss", "training loss", lambda run: run.curve)


def grad_norms(table: Table) -> Lines:
    """The gradient's norm by step, before it is clipped, as SORSA's Figure 3 beside the loss; runs
    of before 0.2 did not record it."""
    return _by_step(table, "grad-norm", "gradient norm", lambda run: run.grad_norms)


def _by_step(table: Table, kind: str, what: str, curve_of: Callable[[Run], Points]) -> Lines:
    known = [one for arm in table.arms if (one := _curve(arm, curve_of))]
    caption = label_of(f"{title(table)}: {what}, mean and range over seeds")
    return Lines(file_of(kind, table), caption, "step", what, known, "y", band=True)


def search(table: Table) -> Lines:
    """The loss on held-out training rows by learning rate; runs that did not finish have no
    point."""
    series = []
    for arm in table.arms:
        known = [(run.learning_rate, run.eval_loss) for run in arm.search if run.status == "finished"]
        known = [(rate, loss) for rate, loss in known if rate and loss is not None]
        if known:
            series.append(Series(label_of(arm.name), *zip(*known, strict=True)))
    caption = f"{title(table)}: search for the learning rate"
    ticks = ticks_at([rate for one in series for rate in one.x], "{:g}".format)
    return Lines(
        file_of("search", table), label_of(caption), "learning rate", "held-out loss", series, "xy", ticks=ticks
    )


def movement(table: Table) -> Lines:
    """ΔD against ΔΣ while training, as SORSA's Figure 2: the mean over the finished seeds at each
    sample."""
    series = []
    for arm in table.arms:
        paths = [{sample[0]: sample[1:3] for sample in (run.movement or {}).get("samples", ())} for run in arm.finished]
        steps = sorted(set(paths[0]).intersection(*paths[1:])) if paths else []
        means = [[fmean(path[step][i] for path in paths) for step in steps] for i in (0, 1)]
        if steps:
            series.append(Series(label_of(arm.name), means[0], means[1]))
    return Lines(file_of("movement", table), label_of(f"{title(table)}: ΔD against ΔΣ"), "ΔΣ", "ΔD", series)


def _differences(table: Table) -> Iterator[tuple[str, str, "Figure"]]:
    """Every arm's difference to the baseline as a point, with its intervals over seeds and over
    items."""
    arms = [arm for arm in table.arms if arm.seeds or arm.items]
    if not arms or table.by_loss:
        return
    kinds = {"over seeds": [arm.seeds for arm in arms], "over items": [arm.items for arm in arms]}
    points = {
        kind: [None if one is None else (one.value, one.interval) for one in found] for kind, found in kinds.items()
    }
    caption = f"{title(table)}: difference to {table.baseline}"
    figure = _rows(caption, [arm.name for arm in arms], points, table.share)
    axes = figure.axes[0]
    axes.axvline(0, color=_GREY, linewidth=1)
    unit = ", points" if table.share else ""
    axes.set_xlabel(label_of(f"{table.main}, less that of {table.baseline}{unit}; 95 % intervals"))
    axes.legend(frameon=False, fontsize="small")
    yield file_of("differences", table), caption, figure


def _scores(table: Table) -> Iterator[tuple[str, str, "Figure"]]:
    """The main score of every trained arm as a point, with its interval over seeds; the base, far
    to the left, is left out."""
    arms = [arm for arm in table.arms if table.main in arm.cells and not arm.untrained]
    if not arms:
        return
    cells = [arm.cells[table.main] for arm in arms]
    names = [f"{arm.name} · {size_text(arm.trained)}" if arm.trained else arm.name for arm in arms]
    caption = f"{table.task}: {table.main}, and trained parameters"
    figure = _rows(caption, names, {"over seeds": [(cell.mean, cell.interval) for cell in cells]}, table.share)
    figure.axes[0].set_xlabel(label_of(f"{table.main}{', %' if table.share else ''}; 95 % intervals over seeds"))
    yield file_of("score", table.task), caption, figure


def _rows(
    caption: str,
    names: Sequence[str],
    points: dict[str, list[tuple[float, Interval | None] | None]],
    share: bool,
) -> "Figure":
    """A row for each name, with a point and its interval of every kind, in the kind's own look;
    None is no point."""
    figure = new_figure(label_of(caption), height=1.4 + 0.36 * len(names))
    axes = figure.axes[0]
    for i, (kind, found) in enumerate(points.items()):
        shift = 0.26 * (i - (len(points) - 1) / 2)
        known = [(at + shift, *one) for at, one in enumerate(found) if one is not None]
        if not known:
            continue
        values = [scaled(value, share) for _, value, _ in known]
        ends = [_ends(value, interval, share) for _, value, interval in known]
        below = [value - low for value, (low, _) in zip(values, ends, strict=True)]
        above = [high - value for value, (_, high) in zip(values, ends, strict=True)]
        style = style_of(i) | {"linestyle": "none", "markersize": 4, "capsize": 2}
        axes.errorbar(values, [at for at, _, _ in known], xerr=[below, above], label=kind, **style)
    axes.set_yticks(range(len(names)), [label_of(name) for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(alpha=0.3, axis="x")
    return figure


def _add_untrained(figure: "Figure", table: Table) -> None:
    """The untrained base's score as a line across: it has no place on a logarithmic axis of trained
    parameters."""
    axes = figure.axes[0]
    for arm in table.arms:
        if arm.untrained and table.main in arm.cells:
            y = scaled(arm.cells[table.main].mean, table.share)
            axes.axhline(y, color=_GREY, linewidth=1, linestyle=":")
            side: dict[str, Any] = {
                "transform": axes.get_yaxis_transform(),
                "ha": "right",
                "va": "bottom",
                "fontsize": "small",
            }
            axes.text(0.99, y, label_of(arm.name), color=_GREY, **side)


def _lines(found: Sequence[Lines]) -> Iterator[tuple[str, str, "Figure"]]:
    for numbers in found:
        if numbers.series:
            yield numbers.name, numbers.title.replace(r"\$", "$"), draw(numbers)


def _curve(arm: Arm, curve_of: Callable[[Run], Points]) -> Series | None:
    """Over the steps that every finished seed has logged; None if there is none."""
    curves = [
        {step: value for step, value in logged if step is not None and value is not None}
        for run in arm.finished
        if (logged := curve_of(run))
    ]
    steps = sorted(set(curves[0]).intersection(*curves[1:])) if curves else []
    points = [[curve[step] for curve in curves] for step in steps]
    if not points:
        return None
    spread = [(min(values), max(values)) for values in points]
    return Series(label_of(arm.name), steps, [fmean(values) for values in points], spread)


def ticks_at(values: Sequence[float], text: Callable[[float], str]) -> dict[float, str]:
    """Labels at the values, earlier ones first, as far as a logarithmic axis has room for each."""
    apart = max(0.03, math.log10(max(values) / min(values)) / 8) if values else 0
    kept: list[float] = []
    for value in values:
        if all(abs(math.log10(value / other)) > apart for other in kept):
            kept.append(value)
    return {value: text(value) for value in kept}


def size_text(count: float) -> str:
    """A count in three digits: 305k, 1.22M, 6.74B."""
    rounded = float(f"{count:.3g}")
    for unit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if rounded >= unit:
            return f"{rounded / unit:g}{letter}"
    return f"{rounded:g}"


def _ends(value: float, interval: Interval | None, share: bool) -> tuple[float, float]:
    """Where a value's bar begins and ends: at the value itself where no interval is known."""
    low, high = interval or (value, value)
    return scaled(low, share), scaled(high, share)


def scaled(value: float, share: bool) -> float:
    """A value as an axis has it: a share in per cent."""
    return 100 * value if share else value


def label_of(text: str) -> str:
    """Text that matplotlib shows as it is: a dollar starts a formula, an underscore ahead hides a
    legend's line."""
    text = text.replace("$", r"\$")
    return f"\u200b{text}" if text.startswith("_") else text


def file_of(kind: str, of: Table | str) -> str:
    """A file's name, without its ending."""
    text = of if isinstance(of, str) else f"{of.task}-{of.budget or ''}"
    return re.sub(r"[^A-Za-z0-9.]+", "-", f"{kind}-{text}").strip("-.").lower()
