"""The figures of a study that measures losses: what is learnt against what is forgotten and against
trained parameters, and what a learning rate that is off costs."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from svdtune.lab.study.arms import MEASURED, Arm, Table
from svdtune.lab.study.plots import file_of, label_of, size_text, ticks_at
from svdtune.lab.study.results import Measurements, Run
from svdtune.lab.study.table import title
from svdtune.reports.figures import draw
from svdtune.reports.numbers import Lines, Series

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_CLIP = 0.05  # nats above the best: a rate that costs more costs too much, and hides the others
_BOTH = "95 % over seeds and items"


def loss_figures(tables: Sequence[Table]) -> Iterator[tuple[str, str, "Figure"]]:
    """(name of the file without its ending, what it shows, the figure), as
    `svdtune.lab.study.plots.figures`.

    Raises:
        SvdtuneError: matplotlib is not installed.
    """
    for table in tables:
        if not table.by_loss:
            continue
        for numbers in (by_forgetting(table), by_size(table)):
            if numbers.series:
                figure = draw(numbers)
                figure.axes[0].axhline(0, color="#50565e", linewidth=1)
                ends = [end for one in numbers.series for end in one.spread[-1]]
                room = 0.1 * (max(ends) - min(ends)) or 0.1 * _CLIP  # one arm, one seed
                # The way down begins far above all ends, which would lie on each other.
                figure.axes[0].set_ylim(min(ends) - room, max(ends) + 4 * room)
                yield numbers.name, numbers.title.replace(r"\$", "$"), figure
        numbers = regret(table)
        if numbers.series:
            figure = draw(numbers)
            figure.axes[0].set_ylim(-0.02 * _CLIP, 1.02 * _CLIP)
            yield numbers.name, numbers.title.replace(r"\$", "$"), figure


def by_forgetting(table: Table) -> Lines:
    """The loss of answers less the baseline's against KL to the base, along the run; at its end
    with the interval over seeds and items."""
    level, series = _level(table), []
    for arm in table.arms:
        runs = _measured(arm)
        if level is None or arm.untrained or not runs or not runs[0].items("kl").size:
            continue
        kl, loss = (np.mean([run.path(kind) for run in runs], axis=0)[1:] for kind in ("kl", "answers"))
        loss = loss - level
        spread = [(y, y) for y in loss[:-1]] + [_ends(arm, float(loss[-1]))]
        series.append(Series(label_of(arm.name), kl.tolist(), loss.tolist(), spread))
    text = f"{title(table)}: learnt against forgotten, along the run; at its end {_BOTH}"
    ticks = ticks_at([one.x[-1] for one in series], "{:.2g}".format)
    x = f"{MEASURED['kl']}, nats"
    return Lines(file_of("forgetting", table), label_of(text), x, _y(table), series, "x", ticks=ticks)


def by_size(table: Table) -> Lines:
    """The loss of answers less the baseline's against trained parameters."""
    level, series = _level(table), []
    for arm in table.arms:
        values = arm.values("answers")
        if level is not None and values is not None and arm.trained:
            y = float(values.mean()) - level
            series.append(Series(label_of(arm.name), [arm.trained], [y], [_ends(arm, y)]))
    text = label_of(f"{title(table)}: learnt by trained parameters; {_BOTH}")
    ticks = ticks_at([one.x[0] for one in series], size_text)
    return Lines(file_of("size", table), text, "trained parameters", _y(table), series, "x", joined=False, ticks=ticks)


def regret(table: Table) -> Lines:
    """What each learning rate costs: the mean loss of answers above the arm's best, cut at 0.05
    nats; a rate at which a run did not finish is there."""
    series = []
    for arm in table.arms:
        found = {rate: _loss(runs) for rate, runs in arm.rates.items() if rate is not None}
        known = [loss for loss in found.values() if loss is not None]
        if len(found) > 2 and known:
            costs = {rate: _CLIP if loss is None else min(_CLIP, loss - min(known)) for rate, loss in found.items()}
            rates = sorted(costs)
            series.append(Series(label_of(arm.name), rates, [costs[rate] for rate in rates]))
    text = label_of(f"{title(table)}: what a learning rate costs")
    ticks = ticks_at([rate for one in series for rate in one.x], "{:g}".format)
    y = f"{MEASURED['answers']} above the arm's best, nats (cut at {_CLIP:g})"
    return Lines(file_of("regret", table), text, "learning rate", y, series, "x", ticks=ticks)


def _loss(runs: Sequence[Run]) -> float | None:
    """The mean over the seeds; None where one did not finish."""
    found = [run.measured for run in runs if run.measured is not None]
    return float(np.mean([one.items("answers").mean() for one in found])) if len(found) == len(runs) else None


def _measured(arm: Arm) -> list[Measurements]:
    return [run.measured for run in arm.finished if run.measured is not None]


def _level(table: Table) -> float | None:
    """The baseline's mean loss of answers."""
    for arm in table.arms:
        values = arm.values("answers")
        if arm.name == table.baseline and values is not None:
            return float(values.mean())
    return None


def _ends(arm: Arm, y: float) -> tuple[float, float]:
    """The interval of the difference to the baseline; the baseline itself has none."""
    found = arm.measured.get("answers")
    return found.interval if found is not None and found.interval else (y, y)


def _y(table: Table) -> str:
    return label_of(f"{MEASURED['answers']} less that of {table.baseline}, nats")
