"""What a study was made to decide: its contrasts, answered from the records, and whether these were
named before the runs were made."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import numpy as np

from svdtune.lab.study.arms import Arm, Table, held_out
from svdtune.lab.study.crossed_effects import Crossed, crossed
from svdtune.lab.study.results import Measurements, Results
from svdtune.lab.study.spec import plan_of
from svdtune.lab.study.statistics import holm, holm_level


@dataclass(frozen=True)
class Answer:
    """One contrast, answered.

    Attributes:
        arm, baseline: the arms; of several named, the baseline with the lowest loss on held-out
            training rows.
        on: what they were compared on.
        margin: a difference below it is none in practice.
        found: arm less baseline.
        p: of no difference, corrected for the table's contrasts (Holm); None where unknown.
        alike: of a difference of the margin or more, corrected likewise.
        least: the smallest difference that the test, so corrected, sees with 80 % power; None where
            unknown.
        named: whether every run carries the plan with this contrast.
    """

    arm: str
    baseline: str
    on: str
    margin: float
    found: Crossed
    p: float | None
    alike: float | None
    least: float | None
    named: bool


def answers(results: Results, table: Table) -> list[Answer]:
    """The study's contrasts in one table, those whose arms both have a finished run."""
    arms = {arm.name: arm for arm in table.arms}
    found = [one for given in results.spec.get("contrasts") or () if (one := _answer(results, arms, given))]
    raw = [one.p for one in found]
    levels = [holm_level(raw[:at] + raw[at + 1 :]) for at in range(len(raw))]
    least = [one.found.least(level) for one, level in zip(found, levels, strict=True)]
    every = zip(found, holm(raw), holm([one.alike for one in found]), least, strict=True)
    return [replace(one, p=p, alike=alike, least=smallest) for one, p, alike, smallest in every]


def _answer(results: Results, arms: dict[str, Arm], given: dict[str, Any]) -> Answer | None:
    arm, others = arms.get(given["arm"]), [arms[name] for name in given["against"] if name in arms]
    known = [other for other in others if held_out(other.finished)] or others[:1]
    if arm is None or not known:
        return None
    baseline = min(known, key=lambda other: fmean(held_out(other.finished) or [0.0]))
    values = _values(arm, baseline, given["on"])
    if values is None:
        return None
    found = crossed(*values)
    plan = plan_of(results.spec)
    runs = [run for one in (arm, *others) for seeds in one.rates.values() for run in seeds]
    named = all(plan in run.plans for run in runs)
    margin = given["margin"]
    return Answer(arm.name, baseline.name, given["on"], margin, found, found.p, found.alike(margin), None, named)


def _values(arm: Arm, baseline: Arm, on: str) -> tuple[np.ndarray, np.ndarray] | None:
    """The two arms' numbers, [seeds, items]."""
    if on == "kl at equal loss":
        paths = [[run.measured for run in one.finished if run.measured is not None] for one in (arm, baseline)]
        return at_equal_loss(*paths) if all(paths) else None
    kind: Any = on
    values = arm.values(kind), baseline.values(kind)
    return None if values[0] is None or values[1] is None else (values[0], values[1])


def at_equal_loss(arm: Sequence[Measurements], baseline: Sequence[Measurements]) -> tuple[np.ndarray, np.ndarray]:
    """The KL of each run and item, [seeds, items], where the run's loss of answers first comes down
    to what both arms come to: the larger of their mean losses at the end. Between two checkpoints,
    KL goes with the loss on a straight line; a run that does not come down so far counts with its
    end."""
    level = max(fmean(float(run.path("answers")[-1]) for run in runs) for runs in (arm, baseline))
    ours, theirs = (np.array([_kl_at(run, level) for run in runs]) for runs in (arm, baseline))
    return ours, theirs


def _kl_at(run: Measurements, level: float) -> np.ndarray:
    losses = run.path("answers")
    for at in range(1, len(losses)):
        if losses[at] <= level:
            fall = losses[at - 1] - losses[at]
            share = (losses[at - 1] - level) / fall if fall > 0 else 1.0
            return run.between("kl", at, min(1.0, max(0.0, share)))
    return run.between("kl", len(losses) - 1, 1.0) if len(losses) > 1 else run.items("kl")
