"""What several verbs have in common: which model, where it computes, the prompt around a text, and
an answer that is printed while it is written."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from svdtune.models import LoadedModel
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


def answer(loaded: "LoadedModel", tokens: Sequence[int], max_new_tokens: int) -> str:
    """Answer a prompt greedily, print the words as they come, and return them.

    Raises:
        SvdtuneError: the prompt is empty, or leaves too little room.
    """
    from transformers import TextStreamer

    from svdtune.evaluation.generation import complete_batch, end_token_ids
    from svdtune.evaluation.items import Item, check_items
    from svdtune.models.loader import context_length
    from svdtune.system import printable

    check_items([Item("the prompt", "", tuple(tokens), "")], max_new_tokens, context_length(loaded.model.config))
    ends = end_token_ids(loaded.model.generation_config, loaded.tokenizer)
    said: list[str] = []

    class Safe(TextStreamer):
        """Answers may hold what steers a terminal."""

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            said.append(text)
            super().on_finalized_text(printable(text), stream_end)

    streamer = Safe(loaded.tokenizer, skip_prompt=True, skip_special_tokens=True)
    complete_batch(loaded.model, [tokens], max_new_tokens, ends, ends[0], streamer)
    return "".join(said)
