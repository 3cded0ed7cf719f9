"""Figures for papers and notebooks, by matplotlib (`pip install 'svdtune[plots]'`).

data = gather([read_facts("runs/sorsa"), read_facts("runs/lora")])
figures(data)["delta"].savefig("delta.pdf")
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svdtune.reports.numbers import Grid, Lines, Numbers, all_numbers, as_csv
from svdtune.system import explain_write_errors, needs

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOURS = ("#0060a8", "#b84a00", "#00724f", "#96307f", "#7a5f00", "#b3262b", "#4b4fc4", "#50565e")
_DASHES = ("-", "--", ":", "-.")
_MARKS = "os^D"
_LOOKS = len(_COLOURS) * len(_MARKS)


def figures(data: dict[str, Any]) -> "dict[str, Figure]":
    """A matplotlib figure for each of `all_numbers`, by name.

    Raises:
        SvdtuneError: matplotlib is not installed.
    """
    return {numbers.name: draw(numbers) for numbers in all_numbers(data)}


def draw(numbers: Numbers) -> "Figure":
    """One figure.

    Raises:
        SvdtuneError: matplotlib is not installed.
    """
    figure = new_figure(numbers.title)
    if isinstance(numbers, Grid):
        _draw_grid(figure.axes[0], numbers)
    else:
        _draw_lines(figure.axes[0], numbers)
    return figure


def new_figure(title: str, height: float = 4) -> "Figure":
    """A figure with empty axes under a title.

    Raises:
        SvdtuneError: matplotlib is not installed.
    """
    with needs("figures need matplotlib", "plots"):
        from matplotlib.figure import Figure
    figure = Figure(figsize=(6.4, height), layout="constrained")
    figure.add_subplot().set_title(title, fontsize="medium")
    return figure


def write_figures(data: dict[str, Any], folder: Path) -> list[Path]:
    """Write every figure as NAME.svg and its numbers as NAME.csv; the same data gives the same
    files.

    Raises:
        SvdtuneError: matplotlib is not installed, or the folder cannot be written.
    """
    written = []
    with explain_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for numbers in all_numbers(data):
            name = re.sub(r"[^\w.-]+", "_", numbers.name)
            written += [folder / f"{name}.csv", folder / f"{name}.svg"]
            written[-2].write_text(as_csv(numbers), encoding="utf-8")
            save(draw(numbers), written[-1])
    return written


def save(figure: "Figure", path: Path) -> None:
    """Write a figure so that the file depends on its numbers alone."""
    import matplotlib

    # Without a date and with a fixed seed for the names of its parts.
    with matplotlib.rc_context({"svg.hashsalt": "svdtune"}):
        figure.savefig(path, metadata={"Date": None})


def style_of(i: int) -> dict[str, Any]:
    """Colour, mark and dashes of the i-th of several; the first 32 are all different."""
    turn = (i + i // len(_COLOURS)) % 4
    return {"color": _COLOURS[i % len(_COLOURS)], "marker": _MARKS[turn], "linestyle": _DASHES[turn]}


def _draw_lines(axes: "Axes", numbers: Lines) -> None:
    many = len(numbers.series) > _LOOKS and numbers.joined
    for i, one in enumerate(numbers.series):
        style = style_of(i) | {"markersize": 3, "linewidth": 0.7 if many else 1.4}
        style |= {} if numbers.joined else {"linestyle": "none"}
        if one.spread and numbers.band:
            axes.plot(one.x, one.y, label=one.name, **(style | {"marker": ""}))
            low, high = zip(*one.spread, strict=True)
            axes.fill_between(one.x, low, high, color=style["color"], alpha=0.15, linewidth=0)
        elif one.spread:
            below = [y - low for y, (low, _) in zip(one.y, one.spread, strict=True)]
            above = [high - y for y, (_, high) in zip(one.y, one.spread, strict=True)]
            axes.errorbar(one.x, one.y, [below, above], label=one.name, **style)
        else:
            axes.plot(one.x, one.y, label=one.name, **(style | ({"marker": ""} if many else {})))
    axes.set(xlabel=numbers.x, ylabel=numbers.y)
    for axis in numbers.log:
        getattr(axes, f"set_{axis}scale")("log")
    # there is no step or layer between two
    if "x" not in numbers.log and all(float(x).is_integer() for x in numbers.xs):
        axes.locator_params("x", integer=True)
    if "y" not in numbers.log and all(float(y).is_integer() for y in numbers.ys):
        axes.locator_params("y", integer=True)
    if numbers.ticks:
        axes.set_xticks(list(numbers.ticks), list(numbers.ticks.values()))
        axes.set_xticks([], minor=True)
    axes.grid(alpha=0.3)
    if not many and len(numbers.series) > 8:  # it would cover the figure
        figure: Any = axes.figure  # no part of a larger one
        figure.set_size_inches(8, max(figure.get_figheight(), 0.6 + 0.18 * len(numbers.series)))
        figure.legend(loc="outside right upper", frameon=False, fontsize="x-small")
    elif not many:
        axes.legend(frameon=False, fontsize="small")


def _draw_grid(axes: "Axes", numbers: Grid) -> None:
    values = [[float("nan") if value is None else value for value in row] for row in numbers.values]
    image = axes.imshow(values, aspect="auto", cmap="Blues", vmin=0)
    axes.set_yticks(range(len(numbers.rows)), numbers.rows, fontsize="small")
    every = max(1, len(numbers.columns) // 16)
    axes.set_xticks(range(0, len(numbers.columns), every), numbers.columns[::every], fontsize="small")
    axes.set(ylabel=numbers.axes[0], xlabel=numbers.axes[1])
    axes.figure.colorbar(image, ax=axes, label=numbers.measure)
