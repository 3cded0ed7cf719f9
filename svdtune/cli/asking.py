"""What `evaluate` and `generate` share: where a model computes, which items it is asked, and in what form."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from svdtune.errors import SvdtuneError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from svdtune.training.recipe import Recipe, Source

_FILE_ENDINGS = {".json", ".jsonl", ".csv", ".parquet", ".gz"}


def placement(dtype: str | None, device: str | None) -> dict[str, Any]:
    """Arguments for loading a model: what the user said, and a GPU where there is one and none was named."""
    import torch

    found = device or ("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else None)
    return {key: value for key, value in {"dtype": dtype, "device": found}.items() if value is not None}


def choose_template(recipe: "Recipe | None", tokenizer: "PreTrainedTokenizerBase", given: str | None) -> str:
    """The user's, or the run's, or the chat template where the tokenizer has one."""
    if given is not None:
        return given
    if recipe is not None:
        return recipe.data.template
    return "chat" if tokenizer.chat_template else "plain"


def held_out(
    recipe: "Recipe | None", data: str | None, split: str | None, config: str | None, limit: int | None
) -> "Source":
    """Where the items come from: the data named, or the run's own held-out rows.

    Raises:
        SvdtuneError: If neither is there.
    """
    from svdtune.training.recipe import Source

    given = {
        key: value for key, value in {"split": split, "config": config, "limit": limit}.items() if value is not None
    }
    if data is not None:
        # Files have no splits; the default of training, "train", would be the wrong one here.
        default = {} if Path(data).suffix in _FILE_ENDINGS or Path(data).exists() else {"split": "test"}
        return Source(source=data, **default | given)
    if recipe is None or recipe.data.eval is None:
        raise SvdtuneError("there is no data to evaluate on: name a file, generator or hub data set with --data")
    return recipe.data.eval.model_copy(update=given)
