"""The tables of a study that measures losses: its contrasts, and what is exploratory: every arm's
losses, its difference to the baseline, its rates, what a run costs."""

from collections.abc import Iterator, Sequence
from statistics import fmean

import numpy as np

from svdtune.evaluation.interval import Interval
from svdtune.lab.study.arms import LOSS, MEASURED, Arm, Table, held_out
from svdtune.lab.study.contrasts import Answer, answers
from svdtune.lab.study.crossed_effects import crossed
from svdtune.lab.study.markdown import escape, table
from svdtune.lab.study.results import Results, Run
from svdtune.lab.study.statistics import LEVEL, Spread
from svdtune.lab.study.table import (
    NONE,
    learning_rate,
    name_of,
    notes_of,
    number,
    p_value,
    seeds,
    size_of,
)

_ON = {"answers": "loss of answers", "kl": "KL to the base", "kl at equal loss": "KL where both have learnt as much"}


def loss_sections(results: Results, found: Table) -> Iterator[tuple[str, str]]:
    """The tables of one task and budget, each with its heading."""
    if answered := answers(results, found):
        yield "Contrasts", contrast_table(answered)
    yield "Losses (exploratory)", "\n\n".join([loss_table(found), *notes_of(found)])
    if any(arm.measured for arm in found.arms):
        yield f"Against {escape(found.baseline or '')} (exploratory)", difference_table(found)
    if any(len(arm.rates) > 1 for arm in found.arms):
        yield "Learning rates", rate_table(found)
    yield "What a run costs", cost_table(found)


def contrast_table(answered: Sequence[Answer]) -> str:
    """Each contrast's difference with its interval over seeds and items, what it could have seen,
    and what follows."""
    head = ["contrast", "on", "difference, 95 %", "p", "alike, p", "could see", "so"]
    rows = [
        [
            f"{escape(one.arm)} − {escape(one.baseline)}",
            _ON[one.on],
            _signed(one.found.value, one.found.interval),
            p_value(one.p),
            p_value(one.alike),
            NONE if one.least is None else _nats(one.least),
            verdict(one),
        ]
        for one in answered
    ]
    return table(head, rows, left=2)


def verdict(one: Answer) -> str:
    """What a contrast says, in a few words; nothing of arms of which one was trained once."""
    if min(one.found.seeds) < 2:
        return "not decided: one seed"
    said = []
    if one.p is not None and one.p < LEVEL:
        said.append("higher" if one.found.value > 0 else "lower")
    if one.alike is not None and one.alike < LEVEL:
        said.append(f"alike within {one.margin:g}")
    text = ", ".join(said) or "not told apart"
    return text if one.named else f"{text} (exploratory: not named before every run)"


def loss_table(found: Table) -> str:
    """Every arm's losses: mean ± sample standard deviation over seeds."""
    labels = [label for label in (*MEASURED.values(), LOSS) if any(label in arm.cells for arm in found.arms)]
    head = ["arm", "trained", "learning rate", "seeds", *labels]
    rows = [
        [name_of(arm, found.budget), size_of(arm, found.budget)[0], learning_rate(arm), seeds(arm)]
        + [NONE if label not in arm.cells else _spread(arm.cells[label]) for label in labels]
        for arm in found.arms
    ]
    return table(head, rows)


def difference_table(found: Table) -> str:
    """Every arm's differences to the baseline, each with its interval over seeds and items; p as it
    is, of no difference in the loss of answers."""
    kinds = [kind for kind in MEASURED if any(kind in arm.measured for arm in found.arms)]
    head = ["arm", *(f"{MEASURED[kind]}, 95 %" for kind in kinds), "p", "could see", "seeds"]
    rows = []
    for arm in found.arms:
        if not arm.measured:
            continue
        first = arm.measured["answers"]
        cells = [_signed(arm.measured[k].value, arm.measured[k].interval) if k in arm.measured else NONE for k in kinds]
        least = NONE if (smallest := first.least()) is None else _nats(smallest)
        rows.append([escape(arm.name), *cells, p_value(first.p), least, " and ".join(map(str, first.seeds))])
    return table(head, rows)


def rate_table(found: Table) -> str:
    """Of every arm the loss on held-out training rows at each rate that it finished; the chosen one
    first, and those named that cannot be told from it. Where a run collapsed, the spread hides
    every difference, so that no rate is called tied for it."""
    rows = []
    for arm in found.arms:
        rates = [(rate, runs) for rate, runs in arm.rates.items() if rate is not None]
        if rates:
            (rate, chosen), *others = rates
            told = [f"{other:g}: {_at_rate(runs, chosen)}" for other, runs in others]
            rows.append([escape(arm.name), f"{rate:g}", _mean(chosen), "; ".join(told) or NONE])
    return table(["arm", "chosen", "held-out loss", "others"], rows, left=4)


def cost_table(found: Table) -> str:
    """Seconds of training, the most memory that the steps took, and the size of the file; means
    over seeds."""
    rows = [[escape(arm.name), *_costs(arm)] for arm in found.arms if not arm.untrained]
    return table(["arm", "seconds", "peak memory, GiB", "file, MB"], rows)


def _costs(arm: Arm) -> Iterator[str]:
    for field, unit, places in (("train_seconds", 1, 0), ("peak_bytes", 2**30, 2), ("saved_bytes", 1e6, 2)):
        values = [value / unit for run in arm.finished if (value := getattr(run, field)) is not None]
        yield f"{fmean(values):.{places}f}" if values else NONE


def _at_rate(runs: Sequence[Run], chosen: Sequence[Run]) -> str:
    losses, best = held_out(runs), held_out(chosen)
    broken = len(runs) - len(losses)
    text = _mean(runs) + (f", {broken} of {len(runs)} not finished" if broken else "")
    if broken or not tied(losses, best):
        return text
    collapsed = sum(run.collapsed for run in runs)
    return f"{text}, {collapsed} of {len(runs)} collapsed" if collapsed else f"{text} (tied)"


def tied(losses: Sequence[float], best: Sequence[float]) -> bool:
    """Whether a rate's losses cannot be told from those of the best, each over its seeds."""
    interval = crossed(*(np.array(one)[:, None] for one in (losses, best))).interval
    return interval is not None and interval.low <= 0 <= interval.high


def _spread(cell: Spread) -> str:
    return _nats(cell.mean) + ("" if cell.sd is None else f" ± {_nats(cell.sd)}")


def _mean(runs: Sequence[Run]) -> str:
    losses = held_out(runs)
    return _nats(fmean(losses)) if losses else NONE


def _signed(value: float, interval: Interval | None) -> str:
    text = _nats(value, "+")
    return text if interval is None else f"{text} ({' to '.join(_nats(end, '+') for end in interval)})"


def _nats(value: float, sign: str = "") -> str:
    return number(value, False, 4, sign)
