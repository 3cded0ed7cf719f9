"""Refuse to train on what the run is scored on: the rows of data.eval, and the data sets of the
evaluation section."""

from collections.abc import Mapping

from rich.console import Console

from svdtune.data import read_rows, to_examples
from svdtune.data.catalogue import scored
from svdtune.data.leaks import Questions, leaks, question_text, refuse_leaks
from svdtune.errors import SvdtuneError
from svdtune.training.recipe import DataSource, Recipe


def check_leaks(
    recipe: Recipe, train: Questions, held_out: Mapping[str, Questions], console: Console | None = None
) -> dict[str, int]:
    """Look for test questions among the training questions.

    Args:
        recipe: its `data.allow_leaks` names the sets that may leak.
        train: what is trained on.
        held_out: what the rows of data.eval ask, by its names.
        console: where to say what is allowed, and which sets are not at hand.

    Returns:
        How many questions of each allowed set are trained on.

    Raises:
        SvdtuneError: naming the rows, if another set leaks; or if a set is allowed that is not
            scored.
    """
    asked = _questions(recipe, held_out, console)
    for name in recipe.data.allow_leaks:
        if name not in asked:
            raise SvdtuneError(
                f"data.allow_leaks names {name!r}, which this recipe is not scored on: {', '.join(asked)}"
            )
    allowed = {}
    for name, test in asked.items():
        if name not in recipe.data.allow_leaks:
            refuse_leaks(test, train, name, recipe.data.train.source)
            continue
        allowed[name] = len(leaks(test, train))
        if console is not None:
            console.print(
                f"leak      {allowed[name]} of the {len(test)} questions of {name} are trained on, as allowed",
                highlight=False,
            )
    return allowed


def _drawn_from(train: DataSource) -> DataSource:
    """The share that was left out of the training rows."""
    return train.model_copy(update={"only": train.without, "without": None})


def _questions(recipe: Recipe, held_out: Mapping[str, Questions], console: Console | None) -> dict[str, Questions]:
    """The questions of every set the run is scored on, by the set's name."""
    sources = recipe.data.eval
    # What was drawn from the training rows asks nothing that they ask; chats may share a turn.
    own = [name for name in held_out if sources[name] == _drawn_from(recipe.data.train)]
    asked = {name or sources[name].source: rows.first() for name, rows in held_out.items() if name not in own}
    section = recipe.evaluation
    for dataset in (found for name in (section.data if section else []) for found in scored(name)):
        if all(dataset.find(split) is None for split in dataset.files):
            # Asking the hub for a whole test set before training would be too much.
            asked[dataset.name] = Questions.of([])
            if console is not None:
                console.print(
                    f"leak      {dataset.name} is not in the data folder, so it is not compared", highlight=False
                )
            continue
        split = (section and section.split) or dataset.test
        examples = to_examples(read_rows(dataset.name, split), dataset.prompt, source=dataset.name)
        asked[dataset.name] = Questions.of([question_text(example.prompt) for example in examples])
    return asked
