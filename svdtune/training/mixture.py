"""Training rows of several sources, each shown as often as its weight says.

Every source is read, encoded and remembered by itself, so a change of weights or of one file leaves
the others cached.
"""

from collections.abc import Sequence

import torch
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from svdtune.data.columns import Columns
from svdtune.data.leaks import Questions
from svdtune.training.recipe import Recipe
from svdtune.training.task_rows import Judged, Rows, TaskRows


class TrainRows:
    """All rows that a recipe trains on, one source after another; as `TaskRows` is of one."""

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        self.parts = [TaskRows(recipe, source.plain) for source in recipe.data.train]

    @property
    def name(self) -> str:
        """What to call the rows in a message."""
        return " and ".join(source.source for source in self.recipe.data.train)

    @property
    def judged(self) -> Judged:
        """The examples of all sources, each once."""
        return [one for part in self.parts for one in part.judged]

    @property
    def questions(self) -> Questions:
        """What the rows ask, each once."""
        return Questions.join(part.questions for part in self.parts)

    @property
    def is_chat(self) -> bool:
        """Whether a source's first prompt is messages."""
        return any(part.is_chat for part in self.parts)

    def encode(self, tokenizer: PreTrainedTokenizerBase, console: Console) -> Rows:
        """The tokens of the examples, as often as their weights say; a line for each source says
        how many there are.

        Raises:
            SvdtuneError: as `TaskRows.encode`.
        """
        encoded = [part.encode(tokenizer, console) for part in self.parts]
        weights = [source.weight for source in self.recipe.data.train]
        if len(encoded) == 1 and weights == [1]:
            return encoded[0]
        seed = self.recipe.training.seed
        orders = [places(len(rows), weight, seed) for rows, weight in zip(encoded, weights, strict=True)]
        told = ", ".join(
            f"{len(order):,} of {source.source} (weight {source.weight:g})"
            for order, source in zip(orders, self.recipe.data.train, strict=True)
        )
        console.print(f"mixture   {told}", highlight=False, soft_wrap=True)
        taken = zip(encoded, orders, strict=True)
        if all(isinstance(rows, Columns) for rows in encoded):
            return Columns.join(rows.take(order) for rows, order in taken if isinstance(rows, Columns))
        return [rows[at] for rows, order in taken for at in order]


def places(count: int, weight: float, seed: int) -> Sequence[int]:
    """Which of `count` rows a pass shows: all of them as often as the weight's whole part says, and
    a share as large as the rest of it, drawn by lot and in the rows' order; at least one row.

    The draw depends on the seed and the count alone, so a run that is resumed has the same rows.
    """
    whole = int(weight)
    rest = max(round((weight - whole) * count), 0 if whole else 1)
    drawn = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:rest]
    return [*range(count)] * whole + sorted(drawn.tolist())
