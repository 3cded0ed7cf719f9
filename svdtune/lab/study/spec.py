"""The study file: which methods are compared, on what, at which budgets, with how many seeds.
Strict, as recipes are."""

import hashlib
import json
from collections.abc import Iterator
from copy import deepcopy
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationError, field_validator, model_validator

from svdtune.data.catalogue import CATALOGUE
from svdtune.data.examples import COMPLETION, PROMPT
from svdtune.errors import SvdtuneError
from svdtune.planning import parse_budget
from svdtune.training.collection import find_file, merge, read_extended, set_at
from svdtune.training.problems import Problem, from_pydantic, refuse
from svdtune.training.recipe import Data, check_recipe
from svdtune.training.sections import DataSource, EvaluationSection, Section
from svdtune.training.yaml_files import read_text, read_yaml

Settings = dict[str, Any]


def _rates(rates: list[float]) -> list[float]:
    if len(set(rates)) < len(rates) or not rates or min(rates) <= 0:
        raise ValueError(f"expected different learning rates above 0; got {rates}")
    return rates


def _values(values: list[Any]) -> list[Any]:
    if not values or any(value in values[:at] for at, value in enumerate(values)):
        raise ValueError(f"expected different values, one or more; got {values!r:.60}")
    return values


Rates = Annotated[list[float], AfterValidator(_rates)]


class ArmSection(Section):
    """One contender: a method with its settings, and how it differs from the recipe otherwise."""

    method: Settings | None = Field(None, description="As in a recipe; none for the recipe's own.")
    settings: Settings = Field(default_factory=dict, description="Changes to the recipe for this arm.")
    grid: dict[str, Annotated[list[Any], AfterValidator(_values)]] = Field(
        default_factory=dict, description="Dotted settings; an arm for each value."
    )
    ranks: Literal["uniform", "sara", "random", "reverse"] = Field(
        "uniform",
        description="Ranks of the layers: one; those of SARA; SARA's dealt out anew with each seed; or the other way round.",
    )
    learning_rates: Rates | None = Field(None, description="Candidates of this arm alone.")
    tuned_as: str | None = Field(None, description="Take the learning rate found for that arm.")
    budget: bool = Field(True, description="Whether the study's budgets set its size.")
    untrained: bool = Field(False, description="Score the base model as it is.")


class Tune(Section):
    """How learning rates are found: the same small search for every arm, never on test data."""

    learning_rates: Rates = Field(description="Candidates.")
    share: float = Field(0.1, gt=0, lt=1, description="Of the training rows, held out where a recipe has no data.eval.")
    seed: int = Field(0, ge=0, lt=2**32, description="Of the search, and of what is held out.")
    extend: int = Field(0, ge=0, le=8, description="So many more candidates, where the best is the first or the last.")
    finish: int = Field(
        1, ge=1, description="The best so many candidates make every seed's run, with the rows held out in each."
    )


class MeasuredSet(DataSource):
    """Items that a run's predictions are measured on; a bare text stands for `{source: text}`."""

    prompt: str | None = Field(None, description="As in a recipe's data; null: that of the data set.")
    completion: str | None = Field(None, description="Likewise.")
    template: str | None = Field(None, description="Null: the recipe's for answers, plain for text.")

    def rows(self) -> DataSource:
        """Where its rows come from: of a data set of the papers the split that is tested."""
        known = CATALOGUE.get(self.source)
        given = {name: getattr(self, name) for name in DataSource.model_fields}
        return DataSource(**given | ({"split": known.test} if known and self.split is None else {}))

    def fields(self) -> tuple[str, str]:
        """What is asked, and what is answered."""
        known = CATALOGUE.get(self.source)
        prompt, completion = (known.prompt, known.completion) if known else (PROMPT, COMPLETION)
        return self.prompt or prompt, self.completion or completion


Sets = dict[str, MeasuredSet]


class Measure(Section):
    """What is measured of every final run's predictions; see `svdtune.lab.study.measurement`."""

    answers: Sets = Field(min_length=1, description="By name, items whose reference answers' loss is taken.")
    text: Sets = Field(default_factory=dict, description="By name, text for loss and KL(base ‖ tuned).")
    items: int | None = Field(None, ge=2, description="At most so many of each set, the same in every run.")
    checkpoints: int = Field(1, ge=1, description="Measured at so many equal parts of the steps.")

    @model_validator(mode="after")
    def _names_differ(self) -> "Measure":
        if both := sorted(self.answers.keys() & self.text.keys()):
            raise ValueError(f"expected different names in answers and text; got {', '.join(both)} in both")
        return self


class Contrast(Section):
    """One comparison that a study is made for, named before it runs; everything else on its page is
    exploratory."""

    arm: str = Field(description="The arm in question.")
    against: list[str] = Field(
        min_length=1, description="An arm; of several that with the lowest loss on the held-out training rows."
    )
    on: Literal["answers", "kl", "kl at equal loss"] = Field(
        "answers", description="Loss of answers; KL to the base; that where both come to the same loss of answers."
    )
    margin: float = Field(0.005, gt=0, description="A difference below it, in nats, is none in practice.")

    @field_validator("against", mode="before")
    @classmethod
    def _one_or_several(cls, names: Any) -> Any:
        return [names] if isinstance(names, str) else names


class Study(Section):
    """A study whose arms are expanded: every arm has one method and no grid."""

    title: str = Field(min_length=1)
    question: str = Field("", description="One sentence: what the study is to find out.")
    tasks: dict[str, str] = Field(min_length=1, description="Name → recipe file, relative to the study file.")
    settings: Settings = Field(default_factory=dict, description="Changes to every recipe.")
    budgets: list[int | float | str] = Field(default_factory=list, description="Trained parameters: 500k, 1.5M, 0.1%.")
    arms: dict[str, ArmSection] = Field(min_length=1)
    tune: Tune | None = Field(None, description="None: the learning rates are those of the recipes.")
    seeds: list[int]
    baseline: str | None = Field(None, description="The arm that the others are compared with.")
    measure: Measure | None = Field(None, description="Losses on held-out items, and distance from the base.")
    contrasts: list[Contrast] = Field(
        default_factory=list, max_length=4, description="What the study is made to decide, named before it runs."
    )
    generate: bool = Field(True, description="Whether final runs answer the sets of the recipe's evaluation section.")

    @property
    def plan(self) -> str | None:
        """12 hex digits over the contrasts and what they are measured on, which the records carry;
        None without contrasts."""
        if not self.contrasts:
            return None
        return plan_of(self.model_dump(mode="json"))

    @field_validator("budgets", mode="before")
    @classmethod
    def _are_budgets(cls, budgets: Any) -> Any:
        for budget in budgets if isinstance(budgets, list) else []:
            parse_budget(str(budget))
        return budgets

    @field_validator("seeds")
    @classmethod
    def _distinct(cls, seeds: list[int]) -> list[int]:
        if len(set(seeds)) < len(seeds) or not seeds or min(seeds) < 0 or max(seeds) >= 2**32:
            raise ValueError(f"expected different seeds from 0 up, below 2³²; got {seeds}")
        return seeds


def plan_of(spec: Settings) -> str:
    """`Study.plan` of a study's settings, as its results have them."""
    parts = [spec["contrasts"], spec["measure"]]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


def load_study(path: str | Path) -> tuple[Study, dict[str, Settings]]:
    """Read a study file and check all of it, every arm's recipe included.

    Args:
        path: the YAML file, or the name of one that comes with svdtune, such as "small/math".

    Returns:
        The study, its grids expanded into arms, and by task the settings of its recipe with the
        study's changes.

    Raises:
        SvdtuneError: with all problems.
    """
    path = find_file(path, "study")
    given = read_yaml(read_text(path), str(path))
    if not isinstance(given, dict):
        raise SvdtuneError(f"{path} holds no settings: expected {', '.join(Study.model_fields)}")
    arms, problems = _expanded(given.get("arms"))
    study = None
    try:
        study = Study.model_validate({**given, "arms": arms} if "arms" in given else given)
    except ValidationError as error:
        problems += [p for p in from_pydantic(error, Study) if not (p.path.startswith("arms") and problems)]
    refuse(problems, str(path))
    assert study is not None
    problems += _references(study)
    tasks = {}
    for name, recipe in study.tasks.items():
        try:
            tasks[name] = merge(read_extended(path.parent / recipe), study.settings)
        except SvdtuneError as error:
            problems.append(Problem(f"tasks.{name}", str(error)))
        else:
            tasks[name].pop("output", None)
    problems += _recipe_problems(study, tasks)
    refuse(problems or list(_other_items(study, tasks)), str(path))
    return study, tasks


def arm_settings(recipe: Settings, arm: ArmSection) -> Settings:
    """The recipe's settings as an arm changes them."""
    changed = merge(recipe, arm.settings)
    return {**changed, "method": arm.method} if arm.method is not None else changed


def _expanded(given: Any) -> tuple[dict[str, ArmSection], list[Problem]]:
    """The arms, one for each point of their grids, and what is wrong with them."""
    arms: dict[str, ArmSection] = {}
    problems: list[Problem] = []
    if not isinstance(given, dict):
        return arms, [Problem("arms", f"expected a section with an arm or more; got {given!r:.60}")]
    for name, settings in given.items():
        try:
            arm = ArmSection.model_validate(settings)
        except ValidationError as error:
            problems += [
                Problem(f"arms.{name}.{p.path}".rstrip("."), p.message) for p in from_pydantic(error, ArmSection)
            ]
            continue
        problems += [Problem(f"arms.{name}", message) for message in _method_problems(arm)]
        for values in product(*arm.grid.values()):
            point = dict(zip(arm.grid, values, strict=True))
            label = " ".join([name, *(f"{key.rpartition('.')[2]}={value}" for key, value in point.items())])
            if label in arms:
                problems.append(Problem(f"arms.{name}", f"there are two arms {label!r}, grids expanded; rename one"))
            try:
                arms[label] = _at(arm, point)
            except SvdtuneError as error:
                problems.append(Problem(f"arms.{name}.grid", str(error).removeprefix("--")))
    return arms, problems


def _method_problems(arm: ArmSection) -> Iterator[str]:
    """Where it is not clear which method an arm means."""
    if arm.method is not None and "method" in arm.settings:
        yield "method and settings.method are two methods; give one of them"
    parts = [key for key in arm.grid if key.startswith("method.")]
    if arm.method is None and "method" not in arm.settings and parts and "method.name" not in parts:
        yield f"the grid's {parts[0]} needs a method section in the arm, with a name; copy the recipe's there"


def _at(arm: ArmSection, point: Settings) -> ArmSection:
    """An arm at one point of its grid."""
    changes: Settings = {"method": deepcopy(arm.method or {}), **deepcopy(arm.settings)}
    for dotted, value in point.items():
        set_at(changes, dotted, value)
    method = changes.pop("method")
    return arm.model_copy(update={"method": method or None, "settings": changes, "grid": {}})


def _references(study: Study) -> list[Problem]:
    """Names of arms that are none, and settings that exclude each other."""
    problems = []
    known = ", ".join(study.arms)
    if study.baseline is not None and study.baseline not in study.arms:
        problems.append(Problem("baseline", f"there is no arm {study.baseline!r}; there are {known}"))
    problems += [Problem(f"contrasts.{at}", message) for at, message in _contrast_problems(study)]
    for name, arm in study.arms.items():
        other = study.arms.get(arm.tuned_as or "")
        if arm.tuned_as is not None and (other is None or other.tuned_as is not None or other.untrained):
            problems.append(
                Problem(f"arms.{name}.tuned_as", f"expected an arm that is tuned itself; got {arm.tuned_as!r}")
            )
        if arm.tuned_as is not None and arm.learning_rates is not None:
            problems.append(Problem(f"arms.{name}", "tuned_as excludes learning_rates; give one of them"))
        if study.tune is None and len(arm.learning_rates or []) > 1:
            problems.append(Problem(f"arms.{name}.learning_rates", "choosing among several needs the section tune"))
        own = [key for key in ("method", "learning_rates", "tuned_as") if getattr(arm, key) is not None]
        if arm.untrained and own:
            problems.append(Problem(f"arms.{name}", f"an untrained arm has no {own[0]}; take one of them out"))
    return problems


def _contrast_problems(study: Study) -> Iterator[tuple[int, str]]:
    """What keeps a contrast from being computed."""
    known, measure = ", ".join(study.arms), study.measure
    for at, one in enumerate(study.contrasts):
        yield from ((at, f"there is no arm {name!r}; there are {known}") for name in _unknown(one, study))
        if one.arm in one.against:
            yield at, f"{one.arm!r} is compared with itself; name other arms"
        if measure is None or (one.on != "answers" and not measure.text):
            yield at, f"{one.on} is not measured; add measure.{'answers' if one.on == 'answers' else 'text'}"
        elif one.on == "kl at equal loss" and measure.checkpoints < 3:
            yield at, f"kl at equal loss needs 3 checkpoints or more; measure.checkpoints is {measure.checkpoints}"


def _unknown(contrast: Contrast, study: Study) -> list[str]:
    return [name for name in (contrast.arm, *contrast.against) if name not in study.arms]


def _recipe_problems(study: Study, tasks: dict[str, Settings]) -> list[Problem]:
    """What is wrong with the recipe of any arm on any task; said once where several share it."""
    found: dict[str, str] = {}
    for task, recipe in tasks.items():
        for name, arm in study.arms.items():
            settings = arm_settings(recipe, arm)
            for message in _problems_of(settings):
                found.setdefault(message, f"arm {name} on {task}")
    return [Problem(where, message) for message, where in found.items()]


def _other_items(study: Study, tasks: dict[str, Settings]) -> Iterator[Problem]:
    """Arms that would be measured on other items than the rest, since other ones fit."""
    for task, recipe in tasks.items() if study.measure else ():
        default = Data.model_fields["max_length"].default
        data = {name: arm_settings(recipe, arm).get("data") for name, arm in study.arms.items()}
        lengths = {name: (one or {}).get("max_length", default) for name, one in data.items()}
        if len(set(lengths.values())) > 1:
            told = ", ".join(f"{name} {length}" for name, length in lengths.items())
            yield Problem(
                "measure",
                f"the arms differ in data.max_length on {task} ({told}), so that other items would fit and be measured; "
                "give all of them one",
            )


def _problems_of(settings: Settings) -> Iterator[str]:
    try:
        recipe = check_recipe({**settings, "output": {"dir": "runs"}}, "")
    except SvdtuneError as error:
        first, *lines = str(error).splitlines()
        yield from map(str.strip, lines or [first])
        return
    if recipe.evaluation is None:
        yield "the recipe has no evaluation section, which says what a run is scored on"
    elif any(_is_scored(source, recipe.evaluation) for source in recipe.data.eval.values()):
        yield "data.eval is what the runs are scored on; the search for learning rates must not see it"


def _is_scored(held_out: DataSource, evaluation: EvaluationSection) -> bool:
    """Whether held-out rows may be among those that the evaluation section scores."""
    split = held_out.split or "train"
    if any(_overlap(held_out, one) for one in evaluation.sources):
        return True
    for one in evaluation.known:
        same = held_out.source in CATALOGUE and CATALOGUE[held_out.source].files == one.files
        # Of test rows there are several splits, which overlap.
        if same and (split == (evaluation.split or one.test) or split not in ("train", "valid")):
            return True
    return False


def _overlap(one: DataSource, other: DataSource) -> bool:
    """Whether two sources may have rows in common: of one name and split, unless one is the share
    that the other leaves out."""
    same = all(getattr(one, name) == getattr(other, name) for name in ("source", "split", "config"))
    apart = (one.only is not None and one.only == other.without) or (
        one.without is not None and one.without == other.only
    )
    return same and not apart
