"""What every arm of a study came to, for each task and budget: the numbers of the tables and
figures."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import fmean
from typing import Any

import numpy as np

from svdtune.evaluation.interval import wilson_interval
from svdtune.lab.study.crossed_effects import Crossed, crossed
from svdtune.lab.study.results import Kind, Results, Run
from svdtune.lab.study.statistics import (
    CHANCE,
    Difference,
    Spread,
    against_levels,
    holm,
    over_items,
    over_seeds,
    spread,
)

AVERAGE = "average"
LOSS = "training loss"
MEASURED: dict[Kind, str] = {"answers": "loss of answers", "kl": "KL to the base", "text": "loss of text"}
_PAPER = "paper"  # what a set's further metrics call its accuracy by a paper's grading
_MOVEMENT = {"delta_sigma": "ΔΣ", "delta_d": "ΔD", "angle": "subspace angle, degrees"}


@dataclass(frozen=True)
class Column:
    """A measure of every finished run.

    Attributes:
        label: What it is called.
        value: Its value of a run, None where the run has none.
        share: Whether it is a share of items, shown in per cent.
        of: The set whose main score it is, None if it is none.
    """

    label: str
    value: Callable[[Run], float | None]
    share: bool = False
    of: str | None = None


@dataclass(frozen=True)
class Arm:
    """An arm of one table.

    Attributes:
        name: What it is called.
        untrained: Whether it is the base model as it is.
        matched: Whether its trained parameters were fitted to the table's budget.
        tuned_as: The arm that its learning rate was found for, None if its own or none.
        finished: Final runs that have all scores, by seed.
        broken: Other final runs.
        missing: Seeds without a final run.
        search: The runs that the learning rate was chosen by.
        cells: By column.
        levels: By column, "at chance" and the like.
        seeds: Difference to the baseline over seeds, p corrected over the table's arms.
        items: Likewise over items.
        rates: The final runs of every learning rate that was finished, the chosen one's first.
        measured: By what is measured, the difference to the baseline over seeds and items.
    """

    name: str
    untrained: bool
    matched: bool
    tuned_as: str | None
    finished: Sequence[Run]
    broken: Sequence[Run]
    missing: Sequence[int]
    search: Sequence[Run]
    cells: dict[str, Spread] = field(default_factory=dict)
    levels: dict[str, str] = field(default_factory=dict)
    seeds: Difference | None = None
    items: Difference | None = None
    rates: dict[float | None, list[Run]] = field(default_factory=dict)
    measured: dict[Kind, Crossed] = field(default_factory=dict)

    def values(self, kind: Kind) -> np.ndarray | None:
        """What was measured of each finished seed, [seeds, items]; None where nothing was."""
        rows = [run.measured.items(kind) for run in self.finished if run.measured is not None]
        return np.array(rows) if rows and rows[0].size else None

    @property
    def trained(self) -> float | None:
        """Trained parameters, on average over the seeds (random ranks differ a little)."""
        counts = [
            run.trained_parameters for run in [*self.finished, *self.broken] if run.trained_parameters is not None
        ]
        return float(np.mean(counts)) if counts else None

    @property
    def scores(self) -> dict[int, float]:
        """The average of each finished seed."""
        return {run.seed: run.average for run in self.finished if run.average is not None}


@dataclass(frozen=True)
class Table:
    """The arms of one task at one budget; `share` says that scores are shares of items."""

    task: str
    budget: int | None
    columns: Sequence[Column]
    arms: Sequence[Arm]
    baseline: str | None
    share: bool

    @property
    def main(self) -> str:
        """The column that the arms are compared by."""
        labels = [column.label for column in self.columns]
        first = (*(column.label for column in self.columns if column.of), MEASURED["answers"], LOSS)
        return AVERAGE if AVERAGE in labels else next(label for label in first if label in labels)

    @property
    def by_loss(self) -> bool:
        """Whether losses are all that was measured, and no answers were graded."""
        return self.main == MEASURED["answers"]


def tables(results: Results) -> list[Table]:
    """A table for each task and budget; arms that were not fitted to a budget are in all of their
    task's."""
    found = []
    for task in _in_order((run.task for run in results.runs), results.spec.get("tasks")):
        runs = _whole_rounds(results, [run for run in results.runs if run.task == task])
        budgets = sorted({run.budget for run in runs if run.budget is not None})
        every: Sequence[int | None] = budgets or [None]
        for budget in every:
            found.append(_table(results, task, budget, [run for run in runs if run.budget in (budget, None)]))
    return found


def _whole_rounds(results: Results, runs: list[Run]) -> list[Run]:
    """The runs without the final ones of seeds that not every arm has made at every rate: a mean
    over other seeds than the neighbour's compares seeds. All where no seed is whole."""
    left = set(left_out(results, runs))
    return [run for run in runs if run.phase == "tune" or not run.method or run.seed not in left]


def left_out(results: Results, runs: Sequence[Run]) -> list[int]:
    """The seeds of a study of losses with which some arm made fewer runs than with another seed,
    where a seed is whole."""
    if not results.spec.get("measure"):
        return []
    made = Counter((run.arm, run.budget, run.seed) for run in runs if run.phase == "final" and run.method)
    seeds = {seed for _, _, seed in made}
    short = set()
    for arm, budget in {key[:2] for key in made}:
        each = {seed: made[arm, budget, seed] for seed in seeds}
        short |= {seed for seed, count in each.items() if count < max(each.values())}
    return sorted(short) if short < seeds else []


def _table(results: Results, task: str, budget: int | None, runs: Sequence[Run]) -> Table:
    columns = list(_columns([run for run in results.runs if run.task == task and run.phase == "final"]))
    names = _in_order((run.arm for run in runs), results.spec.get("arms"))
    arms = [_arm(results, name, budget, [run for run in runs if run.arm == name], columns) for name in names]
    arms = [replace(arm, levels=_levels(arm, arms, columns)) for arm in arms]
    reference = next((arm for arm in arms if arm.name == results.baseline), None)
    if reference is not None:
        arms = _compared(arms, reference)
    share = any(column.share for column in columns)
    return Table(task, budget, columns, arms, results.baseline, share)


def _columns(runs: Sequence[Run]) -> Iterator[Column]:
    sets = {name: score for run in runs for name, score in run.scores.items()}
    for name, score in sets.items():
        label = name if score.metric == "accuracy" else f"{name}, {score.metric}"
        yield Column(label, partial(_score, name), score.is_share, name)
        for other in () if score.is_share else score.others:
            yield Column(f"{name}, {other}", partial(_other_score, name, other))
    share = all(score.is_share for score in sets.values())
    if len(sets) > 1:
        yield Column(AVERAGE, lambda run: run.average, share)
    if any(_PAPER in score.others for score in sets.values()):
        yield Column(f"{AVERAGE} as the papers grade", _as_papers, share)
    for name, label in _MOVEMENT.items():
        if any((run.movement or {}).get(name) is not None for run in runs):
            yield Column(label, partial(_movement, name))
    for kind, text in MEASURED.items():
        if any(run.measured is not None and run.measured.items(kind).size for run in runs):
            yield Column(text, partial(_mean, kind))
    yield Column(LOSS, lambda run: run.loss)


def _score(name: str, run: Run) -> float | None:
    return run.scores[name].value


def _other_score(name: str, other: str, run: Run) -> float | None:
    return run.scores[name].others.get(other)


def _mean(kind: Kind, run: Run) -> float | None:
    return None if run.measured is None else float(run.measured.items(kind).mean())


def _movement(name: str, run: Run) -> float | None:
    return (run.movement or {}).get(name)


def _as_papers(run: Run) -> float | None:
    """The average by the papers' grading, of the sets that they graded otherwise."""
    values = [score.others.get(_PAPER, score.value) for score in run.scores.values()]
    known = [value for value in values if value is not None]
    return fmean(known) if known and len(known) == len(values) else None


def _arm(results: Results, name: str, budget: int | None, runs: Sequence[Run], columns: Sequence[Column]) -> Arm:
    rates = _by_rate([run for run in runs if run.phase == "final"])
    finals = sorted(next(iter(rates.values()), []), key=lambda run: run.seed)
    sets = [column.of for column in columns if column.of]
    finished = [run for run in finals if run.status == "finished" and _has_all(run, sets)]
    spec = results.spec.get("arms", {}).get(name) or {}
    untrained = spec.get("untrained", False) or any(not run.method for run in finals)
    planned = results.spec.get("seeds") or sorted({run.seed for run in results.runs if run.phase == "final"})
    values = {c.label: [v for v in map(c.value, finished) if v is not None] for c in columns}
    return Arm(
        name=name,
        untrained=untrained,
        tuned_as=spec.get("tuned_as"),
        matched=budget is not None and any(run.budget is not None for run in runs),
        finished=finished,
        broken=[run for run in finals if run not in finished],
        missing=sorted(set(planned[:1] if untrained else planned) - {run.seed for run in finals}),
        search=sorted((run for run in runs if run.phase == "tune"), key=lambda run: run.learning_rate or 0.0),
        cells={label: spread(known) for label, known in values.items() if known},
        rates=rates,
    )


def _by_rate(finals: Sequence[Run]) -> dict[float | None, list[Run]]:
    """The runs by learning rate: first the rate with the most finished seeds, and of these with the
    lowest mean loss on held-out training rows."""
    found: dict[float | None, list[Run]] = {}
    for run in finals:
        found.setdefault(run.learning_rate, []).append(run)

    def rank(rate: float | None) -> tuple[int, float]:
        losses = held_out(found[rate])
        return -len(losses), fmean(losses) if losses else 0.0

    return {rate: found[rate] for rate in sorted(found, key=rank)}


def held_out(runs: Sequence[Run]) -> list[float]:
    """The losses on held-out training rows of the runs that finished."""
    return [run.eval_loss for run in runs if run.status == "finished" and run.eval_loss is not None]


def _has_all(run: Run, sets: Sequence[str]) -> bool:
    return all(name in run.scores and run.scores[name].value is not None for name in sets)


def _levels(arm: Arm, arms: Sequence[Arm], columns: Sequence[Column]) -> dict[str, str]:
    """What is to be said of the arm's scores on single sets: at chance, below it, or no better than
    the untrained base."""
    found: dict[str, str] = {}
    base = next((other for other in arms if other.untrained), None)
    for column in columns:
        if not (column.of and column.share and column.label in arm.cells):
            continue
        cell, n = arm.cells[column.label], arm.finished[0].scores[column.of].n
        if column.of in CHANCE:
            chance = CHANCE[column.of]
            side = against_levels(cell, n, chance.guessed, chance.best(n))
            found |= {} if side > 0 else {column.label: "below chance" if side else "at chance"}
        elif base is not None and arm is not base and column.label in base.cells:
            limit = wilson_interval(round(base.cells[column.label].mean * n), n).high
            found |= {column.label: "at the base's level"} if cell.mean <= limit else {}
    return found


def _compared(arms: Sequence[Arm], baseline: Arm) -> list[Arm]:
    """The arms with their differences to the baseline, p corrected over the arms."""
    against = [arm for arm in arms if arm is not baseline and not arm.untrained]
    seeds = _corrected([over_seeds(arm.scores, baseline.scores) for arm in against])
    items = _corrected([_over_items(arm, baseline) for arm in against])
    found = {arm.name: replace(arm, seeds=s, items=i) for arm, s, i in zip(against, seeds, items, strict=True)}
    for name, arm in found.items():
        pairs = {kind: (arm.values(kind), baseline.values(kind)) for kind in MEASURED}
        both = {kind: crossed(a, b) for kind, (a, b) in pairs.items() if a is not None and b is not None}
        found[name] = replace(arm, measured=both)
    return [found.get(arm.name, arm) for arm in arms]


def _corrected(differences: Sequence[Difference | None]) -> list[Difference | None]:
    ps = holm([None if one is None else one.p for one in differences])
    return [one and replace(one, p=p) for one, p in zip(differences, ps, strict=True)]


def _over_items(arm: Arm, baseline: Arm) -> Difference | None:
    """Over items, with the seeds that both have; None where there is none, or items are not right
    or wrong."""
    seeds = arm.scores.keys() & baseline.scores.keys()
    rights: list[dict[str, np.ndarray]] = []
    for one in (arm, baseline):
        runs = [run for run in one.finished if run.seed in seeds]
        found = {name: [run.scores[name].items for run in runs] for name in (runs[0].scores if runs else ())}
        known = {name: [item for item in items if item is not None] for name, items in found.items()}
        if not found or any(len(known[name]) != len(found[name]) for name in found):
            return None
        rights.append({name: np.mean(items, axis=0) for name, items in known.items()})
    return over_items(*rights)


def _in_order(names: Any, planned: Any) -> list[str]:
    """The names in the order of the study file, those without any run among them, then the
    others."""
    return list(dict.fromkeys([*(planned or ()), *names]))
