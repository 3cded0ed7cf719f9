"""What a report reads of a run's files, field by field: a file that has something else in a field
is named with it, and left out."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from svdtune.system import first_line, read_objects, unique_keys
from svdtune.training.problems import from_pydantic

RESULT = "result.json"  # of an evaluation
# Sums and squares of what is larger overflow; no measure of a weight is.
_LARGEST = 1e100


def _in_bounds(value: float) -> float:
    if math.isfinite(value) and abs(value) > _LARGEST:
        raise ValueError(f"expected at most {_LARGEST:g}; got {value:g}")
    return value


Number = Annotated[float, Field(ge=-_LARGEST, le=_LARGEST, allow_inf_nan=False)]
Logged = Annotated[float, AfterValidator(_in_bounds)]  # a run that diverged logs NaN
Count = Annotated[int, Field(ge=0, lt=2**63)]
Size = Annotated[int, Field(ge=1, lt=2**63)]
Share = Annotated[float, Field(ge=0, le=1)]
Name = Annotated[str, Field(max_length=1000)]
Found = TypeVar("Found")


class Record(BaseModel):
    """An object of a file; what else it holds is not read."""

    model_config = ConfigDict(extra="ignore", strict=True)


class Summary(Record):
    """`training.json`; runs of earlier versions lack some of it."""

    trained_parameters: Count | None = None
    total_parameters: Size | None = None
    steps: Count = 0
    loss: Logged | None = None
    train_seconds: Number | None = None
    weights: str | None = None


class LogLine(Record):
    """A line of `train_log.jsonl`."""

    step: Count
    loss: Logged | None = None
    grad_norm: Logged | None = None


class _Interval(Record):
    low: Number | None = None
    high: Number | None = None


class _Accuracy(Record):
    accuracy: Share
    correct: Count
    interval: _Interval | None = None


class _Metric(Record):
    value: Number
    interval: _Interval | None = None


class _Asked(Record):
    source: Name | None = None


class _Settings(Record):
    samples: Size = 1
    data: _Asked | None = None


class Scores(Record):
    """`result.json` of an evaluation; n is None in those that count no items."""

    n: Size | None = None
    task: Name | None = None
    weights: str | None = None
    strict: _Accuracy | None = None
    paper: _Accuracy | None = None
    metrics: dict[Name, _Metric | Number | None] | None = None
    settings: _Settings = _Settings()

    @model_validator(mode="after")
    def _no_more_right_than_asked(self) -> "Scores":
        for score in (self.strict, self.paper):
            if score and self.n is not None and score.correct > self.n * self.settings.samples:
                raise ValueError(f"{score.correct} answers are correct, of {self.n * self.settings.samples}")
        return self


class _Shape(Record):
    out: Size
    inside: Size = Field(alias="in")


class _Spectrum(_Shape):
    rank: Count | None = None
    k: list[Size]
    sum: Number | None = None
    values: list[Annotated[list[Number], Field(min_length=2, max_length=2)]]  # index and σ


class Before(Record):
    """`before.json`: spectra, and ranks at thresholds."""

    thresholds: list[Share] = Field(min_length=1)
    layers: dict[Name, _Spectrum] = Field(min_length=1)

    @model_validator(mode="after")
    def _a_rank_each(self) -> "Before":
        if wrong := [name for name, layer in self.layers.items() if len(layer.k) != len(self.thresholds)]:
            raise ValueError(f"layers.{wrong[0]}.k: expected a rank for each of {len(self.thresholds)} thresholds")
        return self


class _Movement(Record):
    delta_sigma: Number
    delta_d: Number
    relative_change: Number
    angle: Number
    k: Count | None = None
    p: Count | None = None
    condition: Number | None
    orthonormality: dict[Name, Number]


class Sample(Record):
    """A line of `during.jsonl`."""

    step: Count
    seconds: Number | None = None
    layers: dict[Name, _Movement]


class _Delta(Record):
    values: list[Number]
    sum: Number
    stable_rank: Number
    effective_rank: Number


class _Energy(Record):
    count: list[Size] = Field(min_length=1)
    left: list[Number]
    right: list[Number]

    @model_validator(mode="after")
    def _shares_by_count(self) -> "_Energy":
        if not len(self.count) == len(self.left) == len(self.right) or self.count[0] != 1:
            raise ValueError("expected a share of both sides for each count, from 1 on")
        return self


class _Change(_Movement, _Shape):
    delta: _Delta
    energy: _Energy | None


class After(Record):
    """`after.json`: the trained change of each layer."""

    layers: dict[Name, _Change] = Field(min_length=1)


class _Router(Record):
    gate: list[Number] = Field(min_length=1)
    entropy: Number
    dominant: Count
    share: Number


class _Routed(Record):
    items: Count
    tokens: Count
    layers: dict[Name, _Router] = Field(min_length=1)


class RoutingRecord(Record):
    """`routing.json`: the mean gates of Mo-SARA's heads."""

    heads: Annotated[int, Field(ge=1, le=2**16)]
    tasks: dict[Name, _Routed] = Field(min_length=1)

    @model_validator(mode="after")
    def _a_gate_each(self) -> "RoutingRecord":
        for task, found in self.tasks.items():
            for name, layer in found.layers.items():
                if len(layer.gate) != self.heads or layer.dominant >= self.heads:
                    raise ValueError(f"tasks.{task}.layers.{name}: expected the gates of {self.heads} heads")
        return self


def read_record(folder: Path, name: str, kind: type[Record], problems: list[str]) -> dict[str, Any] | None:
    """What a JSON file of a run holds, as plain values.

    Args:
        folder: of the run.
        name: of the file in it.
        kind: what is read of it.
        problems: takes a sentence where the file is damaged.

    Returns:
        None where there is no such file, or it is damaged.
    """
    path = folder / name
    return _read(
        path, problems, lambda: _valid(json.loads(path.read_text("utf-8"), object_pairs_hook=unique_keys), kind)
    )


def read_lines(folder: Path, name: str, kind: type[Record], problems: list[str]) -> list[dict[str, Any]]:
    """The same of a file with an object a line; what a power cut left of the last line does not
    count."""
    return _read(folder / name, problems, lambda: _each_valid(read_objects(folder / name), kind)) or []


def _read(path: Path, problems: list[str], read: Callable[[], Found]) -> Found | None:
    if not path.is_file():
        return None
    try:
        return read()
    except (OSError, ValueError, RecursionError) as error:
        shown = path.name if path.name != RESULT else f"{spelled_out(path.parent.name)}/{path.name}"
        problems.append(f"{shown} is damaged and was left out: {_reason(error)}")
        return None


def _valid(found: Any, kind: type[Record]) -> dict[str, Any]:
    try:
        return kind.model_validate(found).model_dump(by_alias=True)
    except ValidationError as error:
        problem = next(from_pydantic(error, kind))
        raise ValueError(f"{problem.path or 'it'}: {problem.message}") from error


def _each_valid(lines: list[dict[str, Any]], kind: type[Record]) -> list[dict[str, Any]]:
    found = []
    for number, line in enumerate(lines, 1):
        try:
            found.append(_valid(line, kind))
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from error
    return found


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "its values lie too deep in each other"
    return spelled_out(first_line(error))[:300]


def spelled_out(name: str) -> str:
    """A text of others as a page and a terminal can show it: bytes that are no text are written
    out."""
    return name.encode(errors="backslashreplace").decode()
