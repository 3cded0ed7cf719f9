"""`svdtune generate`: one prompt, its answer printed while it is written."""

from typing import Annotated

import typer

from svdtune.cli.options import AdapterFolder, DeviceName, DtypeName, RunOrModel, choose_template
from svdtune.cli.outcome import for_json

app = typer.Typer()


@app.command()
def generate(
    source: RunOrModel,
    prompt: Annotated[str, typer.Argument(help="What to ask.")],
    adapter: AdapterFolder = None,
    template: Annotated[
        str | None, typer.Option(help="plain, chat, or text with {prompt} in it. Default: as the run, or chat.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Length limit of the answer.")] = 256,
    dtype: DtypeName = None,
    device: DeviceName = None,
) -> None:
    """Answer one prompt, greedily, printing the words as they come.

    \b
    svdtune generate runs/sorsa "Tom has 3 apples and buys 4 more. How many does he have?"
    svdtune generate smollm2-135m "What is a singular value?" --max-new-tokens 80
    """
    from transformers import TextStreamer

    from svdtune.data import Example, prompt_ids
    from svdtune.evaluation.decoding import complete_batch, end_token_ids
    from svdtune.evaluation.items import Item, check_items
    from svdtune.export import find_source, open_source
    from svdtune.models.loading import context_length
    from svdtune.models.placement import placement
    from svdtune.system import printable

    found = find_source(source, adapter)
    loaded = open_source(found, **placement(dtype, device))
    template = choose_template(found.recipe, loaded.tokenizer, template)
    tokens = prompt_ids(Example(prompt), loaded.tokenizer, template)
    check_items([Item("the prompt", prompt, tuple(tokens), "")], max_new_tokens, context_length(loaded.model.config))
    ends = end_token_ids(loaded.model, loaded.tokenizer)

    said: list[str] = []

    class Safe(TextStreamer):
        """Answers may hold what steers a terminal."""

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            said.append(text)
            super().on_finalized_text(printable(text), stream_end)

    streamer = Safe(loaded.tokenizer, skip_prompt=True, skip_special_tokens=True)
    complete_batch(loaded.model, [tokens], max_new_tokens, ends, ends[0], streamer)
    for_json({"prompt": prompt, "answer": "".join(said)})
