"""A recipe that works from anywhere: what it names on this disk, by absolute paths."""

from pathlib import Path
from typing import TypeVar

from svdtune.data.catalogue import CATALOGUE, GROUPS
from svdtune.data.readers import GENERATORS
from svdtune.models import SMOLLM2
from svdtune.training.recipe import Recipe
from svdtune.training.sections import DataSource

Source = TypeVar("Source", bound=DataSource)


def from_anywhere(recipe: Recipe) -> Recipe:
    """The recipe with absolute paths to its model, chat template and rows, where they are there;
    all other names stay."""
    model = recipe.model.model_copy(
        update={
            "name": _absolute(recipe.model.name),
            "chat_template": recipe.model.chat_template and _absolute(recipe.model.chat_template),
        }
    )
    data = recipe.data.model_copy(
        update={
            "train": [_settled(source) for source in recipe.data.train],
            "eval": {name: _settled(source) for name, source in recipe.data.eval.items()},
            "allow_leaks": [_absolute(name) for name in recipe.data.allow_leaks],
        }
    )
    evaluation = recipe.evaluation and recipe.evaluation.model_copy(
        update={"data": [_settled(source) for source in recipe.evaluation.data]}
    )
    return recipe.model_copy(update={"model": model, "data": data, "evaluation": evaluation})


def _settled(source: Source) -> Source:
    return source.model_copy(update={"source": _absolute(source.source)})


def _absolute(name: str) -> str:
    path = Path(name).expanduser()
    # a generator, a data set or the embedded model goes before a path of its name
    own = name in GENERATORS or name in CATALOGUE or name in GROUPS or name == SMOLLM2
    return str(path.absolute()) if path.exists() and not own else name
