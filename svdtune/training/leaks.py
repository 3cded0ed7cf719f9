"""Refuse to train on what the run is scored on: the rows of data.eval, and the data sets of the
evaluation section."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

from rich.console import Console

from svdtune.data import read_rows, to_examples
from svdtune.data.examples import COMPLETION
from svdtune.data.leaks import Questions, leaks, question_text, questions, refuse_leaks
from svdtune.errors import SvdtuneError
from svdtune.training.recipe import Recipe
from svdtune.training.sections import DataSource, TrainSource, is_local


class _Asked(NamedTuple):
    """Questions, and which of the training sources they were held out of."""

    questions: Questions
    origin: int | None


def check_leaks(
    recipe: Recipe, train: Sequence[Questions], held_out: Mapping[str, Questions], console: Console
) -> None:
    """Look for test questions among the training questions.

    Args:
        recipe: its `data.allow_leaks` names the sets that may leak.
        train: what each source of data.train asks, in their order. What was held out of one is
            compared with the others.
        held_out: what the rows of data.eval ask, by its names.
        console: where to say what is allowed, and which sets are not at hand.

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
    for name, (test, origin) in asked.items():
        others = [at for at in range(len(train)) if at != origin]
        trained = Questions.join(train[at] for at in others)
        if name not in recipe.data.allow_leaks:
            refuse_leaks(test, trained, name, " and ".join(recipe.data.train[at].source for at in others))
            continue
        known = len(leaks(test, trained))
        console.print(
            f"leak      {known} of the {len(test)} questions of {name} are trained on, as allowed", highlight=False
        )


def _origin(source: DataSource, train: Sequence[TrainSource]) -> int | None:
    """Which of the training sources a source is the held-out share of."""
    for at, one in enumerate(train):
        if one.without is not None and one.plain.model_copy(update={"only": one.without, "without": None}) == source:
            return at
    return None


def _questions(recipe: Recipe, held_out: Mapping[str, Questions], console: Console) -> dict[str, _Asked]:
    """The questions of every set the run is scored on, by the set's name."""
    asked: dict[str, _Asked] = {}

    def add(name: str, source: DataSource, ask: Callable[[], Questions]) -> None:
        origin = _origin(source, recipe.data.train)
        # What was drawn from the only source asks nothing that it asks; chats may share a turn.
        if origin is None or len(recipe.data.train) > 1:
            asked[name] = _Asked(ask(), origin)

    for name, rows in held_out.items():
        source = recipe.data.eval[name]
        add(name or source.source, source, rows.first)
    section = recipe.evaluation
    for source in section.sources if section else []:
        add(source.source, source, partial(_own_questions, recipe, source, console))
    for dataset in section.known if section else []:
        if all(dataset.find(split) is None for split in dataset.files):
            asked[dataset.name] = _Asked(_not_compared(dataset.name, "not in the data folder", console), None)
            continue
        split = (section and section.split) or dataset.test
        examples = to_examples(read_rows(dataset.name, split), dataset.prompt, source=dataset.name)
        asked[dataset.name] = _Asked(Questions.of([question_text(example.prompt) for example in examples]), None)
    return asked


def _own_questions(recipe: Recipe, source: DataSource, console: Console) -> Questions:
    """The questions of a source of the evaluation section."""
    section = recipe.evaluation
    if not is_local(source):
        return _not_compared(source.source, "on the hub", console)
    rows = read_rows(**source.model_dump())[: section.limit if section else None]
    prompt = (section and section.prompt) or recipe.data.prompt
    examples = to_examples(rows, prompt, source=source.source)
    return Questions.of([questions(one.prompt, str(one.row.get(COMPLETION, "")))[0] for one in examples])


def _not_compared(name: str, where: str, console: Console) -> Questions:
    """No questions: asking the hub for a whole test set before training would be too much."""
    console.print(f"leak      {name} is {where}, so it is not compared", highlight=False)
    return Questions.of([])
