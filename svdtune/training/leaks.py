"""Refuse to train on what the run is scored on: the rows of data.eval, and the data sets of the
evaluation section."""

from collections.abc import Mapping, Sequence

from rich.console import Console

from svdtune.data import read_rows, to_examples
from svdtune.data.examples import COMPLETION
from svdtune.data.leaks import Questions, leaks, question_text, questions, refuse_leaks
from svdtune.errors import SvdtuneError
from svdtune.training.recipe import Recipe
from svdtune.training.sections import DataSource, TrainSource, is_local


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
            refuse_leaks(test, train, name, " and ".join(source.source for source in recipe.data.train))
            continue
        allowed[name] = len(leaks(test, train))
        if console is not None:
            console.print(
                f"leak      {allowed[name]} of the {len(test)} questions of {name} are trained on, as allowed",
                highlight=False,
            )
    return allowed


def _drawn_from(train: Sequence[TrainSource]) -> list[DataSource]:
    """The shares that were left out of the training rows."""
    plain = (source.plain for source in train if source.without is not None)
    return [source.model_copy(update={"only": source.without, "without": None}) for source in plain]


def _questions(recipe: Recipe, held_out: Mapping[str, Questions], console: Console | None) -> dict[str, Questions]:
    """The questions of every set the run is scored on, by the set's name."""
    sources = recipe.data.eval
    # What was drawn from the training rows asks nothing that they ask; chats may share a turn.
    drawn = _drawn_from(recipe.data.train)
    own = [name for name in held_out if sources[name] in drawn]
    asked = {name or sources[name].source: rows.first() for name, rows in held_out.items() if name not in own}
    section = recipe.evaluation
    for source in section.sources if section else []:
        if source in drawn:
            continue
        if not is_local(source):
            asked[source.source] = _not_compared(source.source, "on the hub", console)
            continue
        rows = read_rows(**source.model_dump())[: section.limit if section else None]
        prompt = (section and section.prompt) or recipe.data.prompt
        examples = to_examples(rows, prompt, source=source.source)
        texts = [questions(one.prompt, str(one.row.get(COMPLETION, "")))[0] for one in examples]
        asked[source.source] = Questions.of(texts)
    for dataset in section.known if section else []:
        if all(dataset.find(split) is None for split in dataset.files):
            asked[dataset.name] = _not_compared(dataset.name, "not in the data folder", console)
            continue
        split = (section and section.split) or dataset.test
        examples = to_examples(read_rows(dataset.name, split), dataset.prompt, source=dataset.name)
        asked[dataset.name] = Questions.of([question_text(example.prompt) for example in examples])
    return asked


def _not_compared(name: str, where: str, console: Console | None) -> Questions:
    """No questions: asking the hub for a whole test set before training would be too much."""
    if console is not None:
        console.print(f"leak      {name} is {where}, so it is not compared", highlight=False)
    return Questions.of([])
