"""Data sets by name: the files they come in, their splits, and how a row is asked, answered and
graded.

A name stands for its files in the data folder: `data`, or what SVDTUNE_DATA names; `.gz` may
follow. Data sets that are on the hub come from there where the folder lacks them.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from svdtune.data.files import read_file
from svdtune.errors import SvdtuneError
from svdtune.registry import Registry, lab_note

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class DataSet:
    """A data set that is known by its name.

    Attributes:
        name: What recipes and `--data` call it.
        files: For each split that is read from a file, where that may lie in the data folder.
        where: How to get the files.
        hub: Name and configuration on the hub, None where it is not there in this form.
        prompt: The field that is asked; `data.prompt` of a recipe.
        completion: The field that is trained on.
        answer: The field that answers are graded against.
        task: Name of the task that grades it.
        template: Name of the prompt that the paper's evaluation puts around it.
        max_new_tokens: Length limit of the paper's evaluation.
        test: The split that scores are made on.
        made: Splits that are made of others, by functions of this data set.
        convert: What to make of the rows of a split.
    """

    name: str
    files: Mapping[str, tuple[str, ...]]
    where: str
    hub: tuple[str, str | None] | None = None
    prompt: str = "instruction"
    completion: str = "output"
    answer: str = "answer"
    task: str | None = None
    template: str = "plain"
    max_new_tokens: int = 256
    test: str = "test"
    made: Mapping[str, Callable[["DataSet"], Rows]] = field(default_factory=dict)
    convert: Callable[[Rows, str], Rows] | None = None

    @property
    def splits(self) -> list[str]:
        """Every split there is."""
        return [*self.files, *self.made]

    def find(self, split: str) -> Path | None:
        """The file of a split, None where the data folder has none."""
        candidates = [data_folder() / name for name in self.files[split]]
        candidates += [path.with_name(f"{path.name}.gz") for path in candidates]
        return next((path for path in candidates if path.is_file()), None)

    def read(self, split: str) -> Rows | None:
        """The rows of a split; None where the data folder lacks its file, but the hub has it.

        Raises:
            SvdtuneError: if there is no such split, its file is malformed, or it is nowhere to be
                had.
        """
        if split in self.made:
            return self.made[split](self)
        if split not in self.files:
            raise SvdtuneError(f"{self.name} has no split {split!r}: expected one of {', '.join(self.splits)}")
        path = self.find(split)
        if path is None and self.hub is not None:
            return None
        if path is None:
            raise SvdtuneError(
                f"{self.name} ({split}) is not in the data folder {data_folder()}: expected {self.files[split][0]} there; "
                f"get it ({self.where}), or name the data folder in SVDTUNE_DATA"
            )
        rows = read_file(path)
        return self.convert(rows, split) if self.convert else rows


def data_folder() -> Path:
    """Where the files of the data sets lie."""
    return Path(os.environ.get("SVDTUNE_DATA", "data")).expanduser()


CATALOGUE: Registry[DataSet] = Registry("data")
# What a table of a paper is scored on, in the order of its columns: names in CATALOGUE.
GROUPS: Registry[tuple[str, ...]] = Registry("data")


def scored(name: str) -> list[DataSet]:
    """The data sets that a name stands for in evaluation: a group's, or one.

    Raises:
        SvdtuneError: if there is no such set, or nothing grades it.
    """
    sets = [CATALOGUE[member] for member in GROUPS.get(name, (name,)) if member in CATALOGUE]
    if not sets or any(dataset.task is None for dataset in sets):
        known = [*GROUPS, *(dataset.name for dataset in CATALOGUE.values() if dataset.task)]
        raise SvdtuneError(
            f"{name!r} is no data set that is scored; there are {', '.join(known) or 'none'}{lab_note()}"
        )
    return sets
