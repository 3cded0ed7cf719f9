"""What `generate` and `chat` share: an answer that is printed while it is written."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from svdtune.models import LoadedModel


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
