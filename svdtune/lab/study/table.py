"""A study's tables in Markdown: scores, differences to the baseline, the search for learning rates,
and what went wrong."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from statistics import fmean

from svdtune.evaluation.interval import Interval
from svdtune.lab.study.arms import Arm, Column, Table
from svdtune.lab.study.markdown import escape, table
from svdtune.lab.study.results import Run
from svdtune.lab.study.statistics import CHANCE

_MARKS = {"at chance": "†", "below chance": "‡", "at the base's level": "§"}
NONE = "–"
_NEAR = 0.1  # of the budget, beyond which a row says how far its trained parameters are from it


def score_table(found: Table) -> str:
    """Rows are arms: trained parameters, learning rate, mean ± sample standard deviation over
    seeds, seconds."""
    head = ["arm", "trained", "share", "learning rate", "seeds"]
    head += [f"{escape(column.label)}{', %' if column.share else ''}" for column in found.columns]
    rows = [
        [name_of(arm, found.budget), *size_of(arm, found.budget), learning_rate(arm), seeds(arm)]
        + [_cell(arm, column, column.label == found.main) for column in found.columns]
        + [_seconds(arm)]
        for arm in found.arms
    ]
    return "\n\n".join([table([*head, "seconds"], rows), *notes_of(found)])


def notes_of(found: Table) -> Iterator[str]:
    """What the marks mean, and the runs that did not finish or collapsed."""
    yield from _legend(found)
    yield from _broken(found)
    yield from _collapsed(found)


def comparison_table(found: Table) -> str:
    """Every arm's difference to the baseline, with both intervals and p values; a sentence where
    there is none."""
    if found.baseline is None:
        return "The study names no baseline, so nothing is compared."
    baseline = next((arm for arm in found.arms if arm.name == found.baseline), None)
    if baseline is None or not baseline.scores:
        return f"The baseline, {escape(found.baseline)}, has no score here, so nothing is compared."
    against = [arm for arm in found.arms if arm.name != found.baseline and not arm.untrained]
    if not against:
        return "There is no arm beside the baseline."
    points = ", points" if found.share else ""
    head = ["arm", f"difference{points}", "over seeds, 95 %", "p", "seeds", "over items, 95 %", "p", "items"]
    rows = [[escape(arm.name), *_differences(arm, found.share)] for arm in against]
    return table(head, rows)


def search_table(found: Table) -> str | None:
    """The loss on held-out training rows for each learning rate that was tried; None if none
    was."""
    searched = [arm for arm in found.arms if arm.search]
    if not searched:
        return None
    rates = sorted({run.learning_rate for arm in searched for run in arm.search if run.learning_rate is not None})
    rows = []
    for arm in searched:
        tried = {run.learning_rate: run for run in arm.search}
        chosen = _chosen(arm)
        cells = [_searched(tried[rate], rate in chosen) if rate in tried else "" for rate in rates]
        rows.append([escape(arm.name), *cells])
    return table(["arm", *(f"{rate:g}" for rate in rates)], rows)


def title(found: Table) -> str:
    """The table's task and budget."""
    return f"{found.task}, {found.budget:,} trained parameters" if found.budget is not None else found.task


def learning_rate(arm: Arm) -> str:
    """The chosen learning rate, marked where it lies at an edge of those tried: a better one may
    lie beyond."""
    chosen, tried = _chosen(arm), sorted({run.learning_rate for run in arm.search if run.learning_rate is not None})
    if not chosen:
        return NONE
    text = " to ".join(f"{rate:g}" for rate in dict.fromkeys([chosen[0], chosen[-1]]))
    if len(tried) > 1 and tried[0] in chosen:
        text += " (lowest tried)"
    if len(tried) > 1 and tried[-1] in chosen:
        text += " (highest tried)"
    return f"{text} (as {escape(arm.tuned_as)})" if arm.tuned_as else text


def seeds(arm: Arm) -> str:
    """How many seeds finished, what became of the others, and how many of those that finished
    collapsed."""
    total = len(arm.finished) + len(arm.broken) + len(arm.missing)
    if not arm.finished and not arm.broken:
        bad = Counter(run.status for run in arm.search if run.status != "finished")
        tried = len(arm.search)
        why = ", ".join(f"{count} of {tried} learning rates {status}" for status, count in sorted(bad.items()))
        return f"not run: {why}" if why else "not run"
    outcomes = Counter("unscored" if run.status == "finished" else run.status for run in arm.broken)
    told = [f"{count} of {total} seeds {outcome}" for outcome, count in sorted(outcomes.items())]
    told += [f"{len(arm.missing)} of {total} seeds not run"] if arm.missing else []
    collapsed = sum(run.collapsed for run in arm.finished)
    told += [f"{collapsed} of {total} seeds collapsed"] if collapsed else []
    return "; ".join(told) or str(total)


def name_of(arm: Arm, budget: int | None) -> str:
    """An arm's name, starred where its size was not fitted to the budget."""
    return escape(arm.name) + ("" if budget is None or arm.matched or arm.untrained or arm.trained is None else "*")


def size_of(arm: Arm, budget: int | None) -> tuple[str, str]:
    """Trained parameters, and their share of all."""
    runs = [run for run in [*arm.finished, *arm.broken] if run.trained_parameters is not None]
    totals = [run.total_parameters for run in runs if run.total_parameters]
    if not arm.trained:
        return NONE, NONE
    text = f"{arm.trained:,.0f}"
    if budget and arm.matched and abs(arm.trained / budget - 1) > _NEAR:
        text += f" ({arm.trained / budget:.2g} of the budget)"
    return text, f"{arm.trained / totals[0]:.3%}" if totals else NONE


def _cell(arm: Arm, column: Column, with_interval: bool) -> str:
    cell = arm.cells.get(column.label)
    if cell is None:
        return NONE
    places = _places(cell.mean, column.share)
    text = number(cell.mean, column.share, places)
    if cell.sd is not None:
        text += f" ± {number(cell.sd, column.share, places)}"
    if with_interval and cell.interval:
        text += f" ({_between(cell.interval, column.share, places)})"
    return text + _MARKS.get(arm.levels.get(column.label, ""), "")


def _seconds(arm: Arm) -> str:
    known = [run.train_seconds for run in arm.finished if run.train_seconds is not None]
    mean = fmean(known) if known else 0.0
    return f"{mean:,.{0 if mean >= 10 else 1}f}" if known else NONE


def _differences(arm: Arm, share: bool) -> Iterator[str]:
    one = arm.seeds or arm.items
    places = 1 if share else 4
    yield number(one.value, share, places, "+") if one else NONE
    for difference in (arm.seeds, arm.items):
        interval = difference and difference.interval
        yield _between(interval, share, places, "+") if interval else NONE
        yield p_value(difference.p if difference else None)
        yield f"{difference.n:,}" if difference else NONE


def p_value(p: float | None) -> str:
    """A p value."""
    if p is None:
        return NONE
    return f"{p:.3f}" if p >= 0.001 else "< 0.001"


def _between(interval: Interval, share: bool, places: int, sign: str = "") -> str:
    return " to ".join(number(end, share, places, sign) for end in interval)


def _places(value: float, share: bool) -> int:
    """Decimals: one of a percentage; three of another number, or as many as show three figures of
    it."""
    if share:
        return 1
    return max(3, 2 - math.floor(math.log10(abs(value)))) if 1e-9 < abs(value) < 0.1 else 3


def number(value: float, share: bool, places: int, sign: str = "") -> str:
    """A number with so many decimals; a share in per cent."""
    text = f"{100 * value if share else value:{sign}.{places}f}"
    return text.replace("-", "−")


def _chosen(arm: Arm) -> list[float]:
    rates = {run.learning_rate for run in [*arm.finished, *arm.broken] if run.learning_rate is not None}
    return sorted(rates)


def _searched(run: Run, chosen: bool) -> str:
    text = run.status if run.status != "finished" else NONE if run.eval_loss is None else f"{run.eval_loss:.4f}"
    return f"**{text}**" if chosen else text


def _legend(found: Table) -> Iterator[str]:
    """What the marks mean, of those that the table has."""
    used = {level for arm in found.arms for level in arm.levels.values()}
    scores = {name: one for arm in found.arms for run in arm.finished for name, one in run.scores.items()}
    sets = [(escape(c.label), CHANCE[c.of], scores[c.of].n) for c in found.columns if c.of in CHANCE and c.of in scores]
    if "at chance" in used:
        levels = ", ".join(f"{name} {chance.best(n):.1%}" for name, chance, n in sets)
        yield f"† at chance: not above what one answer to every question comes to ({levels}), over seeds or over items."
    if "below chance" in used:
        levels = ", ".join(f"{name} {chance.guessed:.0%}" for name, chance, _ in sets)
        yield f"‡ below chance: below what guessing comes to ({levels}), over seeds and items: wrong in kind."
    if "at the base's level" in used:
        yield "§ at the base's level: not above the 95 % interval of the untrained base."
    if any(name_of(arm, found.budget).endswith("*") for arm in found.arms):
        yield "\\* not fitted to the budget: has the trained parameters it has."


def _broken(found: Table) -> Iterator[str]:
    """Every run that did not finish, by name."""
    lines = [_broken_line(arm, run) for arm in found.arms for run in [*arm.search, *arm.broken] if _is_broken(arm, run)]
    if lines:
        head = "Runs that did not finish (means are over the others, which flatters an arm that has such):"
        yield "\n".join([head, "", *lines])


def _collapsed(found: Table) -> Iterator[str]:
    """Every final run that finished and yet collapsed, by name."""
    runs = [(arm, run) for arm in found.arms for run in arm.finished if run.collapsed]
    if runs:
        head = (
            "Runs that collapsed: their training loss ended above its start, or gave back more than half of its fall. They "
            "count in the means:"
        )
        yield "\n".join([head, "", *(f"- {_run_name(arm, run)}" for arm, run in runs)])


def _is_broken(arm: Arm, run: Run) -> bool:
    return run.status != "finished" or run in arm.broken


def _broken_line(arm: Arm, run: Run) -> str:
    outcome = "has not all scores" if run.status == "finished" else run.status
    return f"- {_run_name(arm, run)}: {outcome}{': ' + escape(run.error) if run.error else ''}"


def _run_name(arm: Arm, run: Run) -> str:
    rate = "" if run.learning_rate is None else f", learning rate {run.learning_rate:g}"
    return f"{escape(arm.name)}, {'in the search' if run.phase == 'tune' else f'seed {run.seed}'}{rate}"


def all_sections(found: Table) -> Sequence[tuple[str, str]]:
    """The tables of one task and budget, each with its heading."""
    parts = [("Scores", score_table(found)), ("Against the baseline", comparison_table(found))]
    search = search_table(found)
    return [*parts, ("Learning rates", search)] if search else parts
