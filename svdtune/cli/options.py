"""What several verbs ask of the user: which model, where it computes, and the prompt around a
text."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from svdtune.training.recipe import Recipe

RunOrModel = Annotated[str, typer.Argument(metavar="RUN_OR_MODEL", help="Run, adapter or model folder, or hub name.")]
AdapterFolder = Annotated[Path | None, typer.Option(help="Adapter folder to put on a model.")]
DtypeName = Annotated[
    str | None, typer.Option(help="float32, bfloat16, float16 or auto. Default: as the run, or auto.")
]
Revision = Annotated[str | None, typer.Option(help="Revision of a model on the hub: a branch, tag or commit.")]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Let code from the model's repository run.")]
DeviceName = Annotated[str | None, typer.Option(help="cuda, cuda:1, cpu... Default: a GPU where there is one.")]


def choose_template(recipe: "Recipe | None", tokenizer: "PreTrainedTokenizerBase", given: str | None) -> str:
    """The user's, or the run's, or the chat template where the tokenizer has one."""
    if given is not None:
        return given
    if recipe is not None:
        return recipe.data.template
    return "chat" if tokenizer.chat_template else "plain"
