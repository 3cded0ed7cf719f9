"""What a study's `results.json` says, checked as far as a page is made of it."""

import math
from collections import Counter
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from svdtune.errors import SvdtuneError
from svdtune.system import explain_read_error

RESULTS = "results.json"
FINDINGS = "findings.md"
# metrics that are shares of items: they are averaged, and shown in per cent
_SHARES = ("accuracy", "pass@")


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


Kind = Literal["answers", "text", "kl"]
"""Loss of reference answers; loss of text; KL(base ‖ tuned) of text. In nats."""
Number = Annotated[float | None, BeforeValidator(_finite)]  # NaN and infinity say no more than null


class _Part(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class SetScore(_Part):
    """A run's score on one set.

    Attributes:
        metric: "accuracy", "BLEU", ...
        value: the score.
        n: how many items the set has.
        correct: which items are right, from `pack`; None where items are not right or wrong.
        others: further metrics of the set.
    """

    metric: str
    value: Number
    n: int = Field(ge=1)
    correct: str | None = None
    others: dict[str, Number] = {}

    @property
    def is_share(self) -> bool:
        """Whether the value is a share of the items."""
        return self.metric.startswith(_SHARES)

    @property
    def items(self) -> np.ndarray | None:
        """Whether each item is right, shape [n]."""
        return None if self.correct is None else unpack(self.correct, self.n)

    @model_validator(mode="after")
    def _agrees(self) -> "SetScore":
        if self.correct is None:
            return self
        share = unpack(self.correct, self.n).mean()
        if self.value is not None and abs(share - self.value) > 0.5 / self.n:
            raise ValueError(f"value is {self.value}, but {share:.4f} of the items in correct are right")
        return self


class Measured(_Part):
    """One measure of one set.

    Attributes:
        path: its mean over the items at every checkpoint.
        items: each item's value at the last, shape [items].
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="ignore", frozen=True)
    path: list[Number]
    items: Annotated[np.ndarray, BeforeValidator(lambda text: np.array(text.split(), float))]


class Measurements(_Part):
    """What was measured of a run: `sets` by set and measure ("nll"; of text also "kl"), `steps` the
    checkpoints, `left_out` by set how many items were too long."""

    steps: list[int]
    sets: dict[str, dict[str, Measured]]
    left_out: dict[str, int] = {}

    def items(self, kind: Kind) -> np.ndarray:
        """The values of all items of a kind, set by set, shape [items]; empty where there are
        none."""
        return np.concatenate([np.empty(0), *(one.items for one in self._of(kind))])

    def path(self, kind: Kind) -> np.ndarray:
        """The mean over these items at every checkpoint, shape [steps]."""
        parts = self._of(kind)
        weights = [len(one.items) for one in parts]
        return np.average([np.array(one.path, float) for one in parts], axis=0, weights=weights)

    def between(self, kind: Kind, at: int, share: float) -> np.ndarray:
        """The values of all items at a share of the way from the checkpoint before `at` to it,
        shape [items]: the means of their sets there, each item in its proportion at the last, the
        only one of which every item is kept."""
        found = []
        for one in self._of(kind):
            before, after = np.array(one.path[at - 1 : at + 1], float)
            mean, last = before + share * (after - before), one.items.mean()
            found.append(one.items * (mean / last) if last else one.items + mean)
        return np.concatenate([np.empty(0), *found])

    def _of(self, kind: Kind) -> list[Measured]:
        sets = [measures for measures in self.sets.values() if ("kl" in measures) == (kind != "answers")]
        return [measures["kl" if kind == "kl" else "nll"] for measures in sets]


class LayerRanks(_Part):
    """SARA's ranks of a model: `k` is [layers][thresholds], a mean over a layer's matrices."""

    thresholds: list[float]
    k: list[list[float]]


class Run(_Part):
    """One run; what a failed one did not come to is None, and the method of an untrained model.
    `curve` has the training loss and `grad_norms` the gradient's norm before clipping, by step."""

    key: str
    arm: str
    task: str
    budget: int | None
    phase: Literal["tune", "final"]
    seed: int
    learning_rate: float | None
    method: dict[str, Any] | None
    status: Literal["finished", "failed", "diverged"]
    error: str | None = None
    trained_parameters: int | None = None
    total_parameters: int | None = None
    steps: int | None = None
    rows: int | None = None
    loss: Number = None
    eval_loss: Number = None
    train_seconds: Number = None
    curve: list[tuple[Number, Number]] = []
    grad_norms: list[tuple[Number, Number]] = []
    scores: dict[str, SetScore] = {}
    movement: dict[str, Any] | None = None
    measured: Measurements | None = None
    saved_bytes: int | None = None
    peak_bytes: int | None = None
    plans: list[str] = []
    machine: int = Field(0, ge=0)

    @property
    def average(self) -> float | None:
        """The mean over the sets, as the papers' tables have it; None where a set has no score."""
        values = [score.value for score in self.scores.values()]
        known = [value for value in values if value is not None]
        return fmean(known) if values and len(known) == len(values) else None

    @property
    def collapsed(self) -> bool:
        """Whether the training loss ended above its start, or gave back more than half of its fall,
        in means over tenths.

        A rise that the loss's own noise could make does not count, and a curve with fewer than ten
        points is never judged.
        """
        losses = [loss for _, loss in self.curve if loss is not None]
        width = len(losses) // 10
        if not width:
            return False
        tenths = [fmean(losses[end - width : end]) for end in range(width, len(losses) + 1)]
        start = min(losses[0], tenths[0])  # the first tenth may hold the explosion
        best = min(start, *tenths)
        noise = median(abs(after - before) for before, after in pairwise(losses))
        return tenths[-1] - best > max((start - best) / 2, 3 * noise)


class Results(_Part):
    """All of a study."""

    title: str
    question: str | None = None
    baseline: str | None = None
    spec: dict[str, Any] = {}
    svdtune: str
    machines: list[dict[str, Any]] = []
    models: dict[str, str] = {}
    ranks: dict[str, LayerRanks] = {}
    command: str | None = None
    runs: list[Run]

    @property
    def not_run(self) -> int:
        """How many of the final runs that the study plans it does not have."""
        seeds, budgets = len(self.spec.get("seeds") or ()), len(self.spec.get("budgets") or ()) or 1
        tune, planned = self.spec.get("tune") or {}, 0
        for arm in (self.spec.get("arms") or {}).values():
            untrained = arm.get("untrained", False)
            searched = self.spec["arms"].get(arm.get("tuned_as"), arm)
            rates = min(tune.get("finish", 1), len(searched.get("learning_rates") or tune.get("learning_rates") or [1]))
            planned += (1 if untrained else seeds * rates) * (
                1 if untrained or not arm.get("budget", True) else budgets
            )
        planned *= len(self.spec.get("tasks") or ())
        return max(0, planned - sum(run.phase == "final" for run in self.runs))

    @property
    def devices(self) -> str:
        """What the runs were made on."""
        return " and ".join(dict.fromkeys(one["device"] for one in self.machines if "device" in one))

    @model_validator(mode="after")
    def _one_of_each(self) -> "Results":
        finals = Counter(
            (run.task, run.budget, run.arm, run.seed, run.learning_rate) for run in self.runs if run.phase == "final"
        )
        twice = [key for key, count in finals.items() if count > 1]
        if twice:
            task, budget, arm, seed, _ = twice[0]
            raise ValueError(f"task {task}, budget {budget}, arm {arm}, seed {seed} is there twice")
        if (last := max((run.machine for run in self.runs), default=0)) >= max(1, len(self.machines)):
            raise ValueError(f"a run was made on machine {last}, counted from 0, but there are {len(self.machines)}")
        for task in dict.fromkeys(run.task for run in self.runs):
            scores = [score for run in self.runs if run.task == task for score in run.scores.values()]
            metrics = {"a share" if score.is_share else score.metric for score in scores}
            if len(metrics) > 1:
                told = ", ".join(sorted(metrics))
                raise ValueError(
                    f"the sets of task {task} have no common average: {told}; make them tasks of their own"
                )
            sizes = {(name, score.n) for run in self.runs if run.task == task for name, score in run.scores.items()}
            measured = [run.measured.sets for run in self.runs if run.task == task and run.measured is not None]
            sizes |= {(f"measured {name}", len(one["nll"].items)) for sets in measured for name, one in sets.items()}
            if len(sizes) > len({name for name, _ in sizes}):
                raise ValueError(f"task {task}: runs disagree on how many items a set has: {sorted(sizes)}")
        return self


def read_results(path: Path) -> Results:
    """Read a study's results.

    Raises:
        SvdtuneError: the file cannot be read, or with all that is wrong in it.
    """
    try:
        return Results.model_validate_json(path.read_bytes())
    except OSError as error:
        raise SvdtuneError(f"cannot read {path}: {explain_read_error(error)}") from error
    except ValidationError as error:
        found = [f"{'.'.join(map(str, each['loc'])) or 'runs'}: {each['msg']}" for each in error.errors()]
        more = f"; and {len(found) - 5} more" if len(found) > 5 else ""
        raise SvdtuneError(f"{path} is no study's results: {'; '.join(found[:5])}{more}") from error


def read_findings(folder: Path) -> str:
    """What was written by hand about the results in a folder; nothing where nothing was."""
    path = folder / FINDINGS
    return path.read_text(encoding="utf-8").strip() if path.is_file() else ""


def pack(correct: "np.ndarray | list[bool]") -> str:
    """Which items are right, as hexadecimal digits of one number: the first item is the highest of
    its n bits."""
    bits = "".join("1" if one else "0" for one in correct)
    return f"{int(bits or '0', 2):0{-(-len(bits) // 4)}x}"


def unpack(digits: str, n: int) -> np.ndarray:
    """The items of `pack`, shape [n], bool.

    Raises:
        ValueError: the digits are no number of n bits.
    """
    bits = f"{int(digits, 16):0{n}b}"
    if len(bits) > n:
        raise ValueError(f"correct has {len(bits)} bits, but there are {n} items")
    return np.array([bit == "1" for bit in bits])
