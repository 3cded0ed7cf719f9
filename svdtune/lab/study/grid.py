"""The runs of a study: each cell (task, budget, arm) with its fitted method, its search, and its
runs over the seeds."""

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from svdtune._version import __version__
from svdtune.errors import SvdtuneError
from svdtune.lab.study.budget import RULES, fit
from svdtune.lab.study.counts import opened
from svdtune.lab.study.ranks import Source
from svdtune.lab.study.spec import ArmSection, Settings, Study, Tune, arm_settings
from svdtune.planning import parse_budget
from svdtune.system import write_json
from svdtune.training.collection import merge
from svdtune.training.recipe import Model

Phase = Literal["tune", "final"]
_LONGEST = 160  # characters of a run's name before its key: file systems take 255 in all


@dataclass(frozen=True)
class Job:
    """One run, ready to be made.

    Attributes:
        arm, task, budget, phase, seed, learning_rate: its place in the study.
        recipe: settings of its recipe, without output.
        untrained: whether the base model is scored as it is.
        heldout: (share, seed) of the training rows that the search holds out; None where the recipe
            has rows of its own.
        measure: what is measured of its predictions.
        generate: whether it answers the recipe's evaluation sets.
    """

    arm: str
    task: str
    budget: int | None
    phase: Phase
    seed: int
    learning_rate: float | None
    recipe: Settings
    untrained: bool = False
    heldout: tuple[float, int] | None = None
    measure: Settings | None = None
    generate: bool = True

    @property
    def key(self) -> str:
        """12 hex digits over all that decides the outcome: a run that another study has made is not
        made again."""
        parts = [self.phase, self.recipe, self.untrained, self.heldout]
        if self.measure is not None or not self.generate:  # else the key is that of a run published before
            parts += [self.measure, self.generate]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def cell(self) -> Settings:
        """Its place in its study, which its key leaves open: other studies, or cells, may share the
        run."""
        return {"arm": self.arm, "task": self.task, "budget": self.budget, "seed": self.seed}

    @property
    def name(self) -> str:
        """What its files are called."""
        rate = "" if self.learning_rate is None else f"-lr{self.learning_rate:g}"
        budget = "" if self.budget is None else f"-{self.budget}"
        text = f"{self.task}-{self.arm}{budget}-{self.phase}{rate}-seed{self.seed}"
        return f"{file_name(text)[:_LONGEST]}-{self.key}"


@dataclass
class Cell:
    """One arm on one task at one budget.

    Attributes:
        arm, task, budget: which.
        spec: the arm.
        recipe: its recipe's settings, the method fitted except for what a seed draws.
        tune: how its learning rate is searched for; None where it is given.
        candidates: the learning rates to try, ascending; grows where the search is extended.
        like: the cell whose learning rates it takes.
        method_of: the fitted method section for a seed.
        measure, generate: as in `Job`, of its final runs.
    """

    arm: str
    task: str
    budget: int | None
    spec: ArmSection
    recipe: Settings
    tune: Tune | None
    candidates: list[float]
    like: "Cell | None" = None
    method_of: Callable[[int], Settings] = field(repr=False, default=lambda _: {})
    measure: Settings | None = None
    generate: bool = True
    extended: int = 0

    @property
    def searched(self) -> bool:
        """Whether its learning rate is searched for before its final runs: not where all candidates
        make these."""
        few = 1 if self.tune is None or self.tune.extend else self.tune.finish
        return self.tune is not None and len(self.candidates) > few and self.like is None

    def search(self) -> list[Job]:
        """The runs of the search; none where nothing is searched."""
        if self.tune is None or not self.searched:
            return []
        return [self._job("tune", rate, self.tune.seed) for rate in self.candidates]

    def finals(self, rates: Sequence[float | None], seeds: list[int]) -> list[Job]:
        """The runs that count, seed by seed at each of the learning rates; an untrained model has
        one."""
        if self.spec.untrained:
            return [self._job("final", None, seeds[0])]
        return [self._job("final", rate, seed) for seed in seeds for rate in rates]

    def ranked(self, losses: dict[float, float | None]) -> list[float]:
        """The learning rates by their held-out loss, the lowest first; none where every run failed
        or diverged."""
        whole = {rate: loss for rate, loss in losses.items() if loss is not None}
        return sorted(whole, key=lambda rate: whole[rate])

    def extend(self, best: float | None) -> bool:
        """Add a candidate beyond an end of the search where the best lies there; whether one was
        added."""
        limit = self.tune.extend if self.tune else 0
        if best is None or self.extended >= limit or best not in (self.candidates[0], self.candidates[-1]):
            return False
        first = best == self.candidates[0]
        near = self.candidates[1] if first else self.candidates[-2]
        beyond = _rounded(best * best / near, best)
        self.candidates = [beyond, *self.candidates] if first else [*self.candidates, beyond]
        self.extended += 1
        return True

    def _job(self, phase: Phase, rate: float | None, seed: int) -> Job:
        what: dict[str, Any] = {"measure": self.measure, "generate": self.generate} if phase == "final" else {}
        if self.spec.untrained:
            return Job(self.arm, self.task, self.budget, phase, seed, None, self.recipe, untrained=True, **what)
        training = {"seed": seed} if rate is None else {"seed": seed, "learning_rate": rate}
        recipe = merge(self.recipe, {"training": training, "method": self.method_of(seed)})
        heldout = None
        if phase == "tune":
            recipe.pop("evaluation", None)
            recipe.pop("analysis", None)
        if self.tune is not None and (phase == "tune" or self.tune.finish > 1):
            if recipe["data"].get("eval") is None:
                heldout = (self.tune.share, self.tune.seed)
        elif "eval_steps" not in recipe["training"]:
            # Rows for the search only.
            recipe["data"] = {k: v for k, v in recipe["data"].items() if k != "eval"}
        return Job(self.arm, self.task, self.budget, phase, seed, rate, recipe, heldout=heldout, **what)


class Fits:
    """Methods fitted to budgets, kept in a file: fitting reads every weight of a model, and a
    second start need not. Without a path they are kept in memory alone.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        try:
            self._known = dict(json.loads(path.read_text(encoding="utf-8"))) if path else {}
        except (OSError, ValueError, TypeError):
            self._known = {}

    def __call__(
        self, method: Settings, model: str, budget: int | None, ranks: Source, seed: int, **origin: Any
    ) -> Settings:
        """`fit(...)`, from the file where it is there."""
        key = json.dumps([__version__, RULES, method, model, budget, ranks, seed, origin], sort_keys=True)
        if key not in self._known:
            self._known[key] = fit(method, model, budget, ranks, seed, **origin)
            if self.path is not None:
                write_json(self.path, self._known, indent=None)
        return self._known[key]


def cells(study: Study, tasks: dict[str, Settings], fits: Fits | None = None) -> list[Cell]:
    """Every cell of a study, its method fitted to the budget.

    Raises:
        SvdtuneError: a method cannot be fitted, or a model's weights cannot be read.
    """
    found: list[Cell] = []
    fits = fits or Fits()
    for task, base in tasks.items():
        here: dict[tuple[str, int | None], Cell] = {}
        budgets: Sequence[int | None] = [count_of(str(given), base) for given in study.budgets] or [None]
        for budget in budgets:
            for name, arm in study.arms.items():
                size = budget if arm.budget and not arm.untrained else None
                if (name, size) not in here:
                    here[name, size] = _cell(study, task, name, arm, arm_settings(base, arm), size, fits)
        for (_, size), cell in here.items():
            if cell.spec.tuned_as is not None:
                named = {other: found for (name, other), found in here.items() if name == cell.spec.tuned_as}
                like = named.get(size) or named.get(None) or (next(iter(named.values())) if len(named) == 1 else None)
                if like is None:
                    raise SvdtuneError(
                        f"the arm {cell.arm} is tuned as {cell.spec.tuned_as}, which has several budgets where this one has "
                        "none: leave budget: false out there, or set it here"
                    )
                cell.like = like
        found += here.values()
    return found


def _cell(
    study: Study, task: str, name: str, arm: ArmSection, recipe: Settings, budget: int | None, fits: Fits
) -> Cell:
    rate = recipe.get("training", {}).get("learning_rate")
    given = arm.learning_rates or (study.tune.learning_rates if study.tune and not arm.untrained else [rate])
    method_of = _fitted(recipe, arm, budget, fits, f"arm {name} on {task}")
    measure = None if study.measure is None else study.measure.model_dump(mode="json")
    return Cell(
        name,
        task,
        budget,
        arm,
        recipe,
        study.tune,
        sorted(given),
        method_of=method_of,
        measure=measure,
        generate=study.generate,
    )


def _fitted(recipe: Settings, arm: ArmSection, budget: int | None, fits: Fits, where: str) -> Callable[[int], Settings]:
    """The method section by seed, of the size that the budget allows and with the ranks that the
    arm asks for."""
    if arm.untrained or (budget is None and arm.ranks == "uniform"):
        return lambda _: recipe["method"]

    model = model_of(recipe)

    def by_seed(seed: int) -> Settings:
        drawn = seed if arm.ranks == "random" else 0
        try:
            return fits(recipe["method"], model.name, budget, arm.ranks, drawn, **model.origin)
        except SvdtuneError as error:
            raise SvdtuneError(f"{where}: {error}") from error

    by_seed(0)
    return by_seed


def _rounded(rate: float, best: float) -> float:
    """The rate with as few digits as keep it on its side of the best."""
    tried = (float(f"{rate:.{digits}g}") for digits in range(1, 17))
    return next((found for found in tried if found != best and (found < best) == (rate < best)), rate)


def count_of(budget: str, recipe: Settings) -> int:
    """A budget in trained parameters; a share is one of the recipe's base model's own."""
    share, count = parse_budget(budget)
    if count is not None:
        return count
    assert share is not None
    model = model_of(recipe)
    return round(share * sum(p.numel() for p in opened(model.name, **model.origin).model.parameters()))


def file_name(text: str) -> str:
    """The text without what is no part of a plain file name."""
    return re.sub(r"[^A-Za-z0-9.=+-]+", "_", text)


def model_of(recipe: Settings) -> Model:
    """The model of a recipe's settings, which may be a name alone."""
    given: Any = recipe["model"]
    return Model.model_validate({"name": given} if isinstance(given, str) else given)
