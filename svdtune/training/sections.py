"""The parts of a recipe that say which rows: where they come from, and what a run is scored on."""

from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_serializer, field_validator, model_validator

from svdtune.data.catalogue import CATALOGUE, GROUPS, DataSet, scored
from svdtune.data.files import FILES, kind
from svdtune.data.prompts import is_template, template_names
from svdtune.data.readers import GENERATORS
from svdtune.registry import is_function, lab_note


class Section(BaseModel):
    """A strict part of a file: no unknown key, no wrong type, no infinity."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, validate_default=True)


class DataSource(Section):
    """Where rows come from; see `svdtune.data.read_rows`. A bare text stands for
    `{source: text}`."""

    source: str = Field(min_length=1, description="File, hub name, generator (arithmetic) or data set of the papers.")
    split: str | None = Field(None, description="Split of a generator or hub data set.")
    config: str | None = Field(None, description="Configuration of a hub data set.")
    limit: int | None = Field(None, ge=1, description="Use only so many rows.")
    seed: int = Field(0, description="Seed of a generator.")
    only: float | None = Field(None, gt=0, lt=1, description="Use only this share, drawn by what rows ask.")
    without: float | None = Field(None, gt=0, lt=1, description="Leave this share out.")

    @model_validator(mode="before")
    @classmethod
    def _bare(cls, value: Any) -> Any:
        return {"source": value} if isinstance(value, str) else value


class TrainSource(DataSource):
    """Rows to train on."""

    weight: float = Field(
        1.0, gt=0, le=1000, description="How often a pass shows each row: 2 twice, 0.5 half of them, drawn by the seed."
    )

    @property
    def plain(self) -> DataSource:
        """The source without its weight."""
        return DataSource.model_validate(self.model_dump(exclude={"weight"}))


def check_template(template: str) -> str:
    """A template as a recipe names it: the name of one, or a text with {prompt}.

    Raises:
        ValueError: it is neither.
    """
    if not is_template(template):
        names = ", ".join(template_names())
        raise ValueError(f"expected {names}, or a text with {{prompt}} in it; got {template!r}{lab_note()}")
    return template


class EvaluationSection(Section):
    """What `svdtune evaluate RUN` scores the run on; training refuses data that asks the same
    questions."""

    data: list[DataSource] = Field(
        min_length=1, description="Data sets of the papers or groups of them by name, and sources of your own."
    )
    task: str | None = Field(
        None, description="How to grade, as evaluate --task; null: as a paper's set asks for, number for your own."
    )
    prompt: str | None = Field(
        None, description="Field that is asked; null: that of the set, data.prompt for your own."
    )
    answer: str | None = Field(None, description="Field to grade against; null: likewise.")
    limit: int | None = Field(None, ge=1, description="Only the first items of every set.")
    split: str | None = Field(None, description="The split of every set, such as unseen; null: that of the paper.")
    template: str | None = Field(None, description="The prompt of the evaluation; null: data.template.")
    max_new_tokens: int | None = Field(None, ge=1, description="Length limit; null: that of each data set's paper.")
    beams: int = Field(1, ge=1, description="Beams of a beam search; 1 is greedy.")
    length_penalty: float = Field(1.0, description="Of a beam search.")
    no_repeat_ngram_size: int = Field(0, ge=0, description="No n-gram of this size twice; 0 for no such rule.")
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        None, description="Of the base weights while they answer; null: model.dtype (in studies float32)."
    )

    @field_validator("data", mode="before")
    @classmethod
    def _one_or_several(cls, data: Any) -> Any:
        return [data] if isinstance(data, str | dict) else data

    @field_validator("data")
    @classmethod
    def _known(cls, data: list[DataSource]) -> list[DataSource]:
        for one in data:
            if not is_source(one.source):
                scored(one.source)
        sources = [one.source for one in data]
        if twice := sorted({source for source in sources if sources.count(source) > 1}):
            raise ValueError(f"names {', '.join(twice)} twice; its scores would be of different rows under one name")
        return data

    @field_serializer("data")
    def _as_written(self, data: list[DataSource]) -> list[Any]:
        return [one.source if _is_set(one) else one.model_dump(mode="json") for one in data]

    @field_validator("task")
    @classmethod
    def _graded(cls, task: str | None) -> str | None:
        """A task that there is. Tasks belong to the evaluation, which comes after training; a
        function of the user's is imported when it is needed, not when a recipe is read."""
        if task is not None and not is_function(task):
            import_module("svdtune.evaluation.tasks").get_task(task)
        return task

    @property
    def sources(self) -> list[DataSource]:
        """The sources of one's own."""
        return [one for one in self.data if not _is_set(one)]

    @property
    def known(self) -> list[DataSet]:
        """The papers' data sets, groups as their members."""
        return [dataset for one in self.data if _is_set(one) for dataset in scored(one.source)]

    @field_validator("template")
    @classmethod
    def _has_prompt(cls, template: str | None) -> str | None:
        return template and check_template(template)


def _is_set(source: DataSource) -> bool:
    """Whether a source is the bare name of a set of the papers, or of a group of them."""
    named = source.source in CATALOGUE or source.source in GROUPS
    return named and source == DataSource.model_validate(source.source)


def is_source(name: str) -> bool:
    """Whether a text can name rows of one's own: a file, a generator, or a data set that somebody
    has on the hub (owner/name)."""
    path = Path(name).expanduser()
    return kind(path) in FILES or path.is_file() or name in GENERATORS or name.count("/") == 1


def is_local(source: DataSource) -> bool:
    """Whether its rows are at hand: a file, or made by a generator."""
    path = Path(source.source).expanduser()
    return source.source in GENERATORS or kind(path) in FILES or path.exists()
