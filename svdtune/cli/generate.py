"""`svdtune generate`: one prompt, its answer printed while it is written."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer()


@app.command()
def generate(
    source: Annotated[str, typer.Argument(metavar="RUN_OR_MODEL", help="Run, adapter or model folder, or hub name.")],
    prompt: Annotated[str, typer.Argument(help="What to ask.")],
    adapter: Annotated[Path | None, typer.Option(help="Adapter folder to put on a model.")] = None,
    template: Annotated[
        str | None, typer.Option(help="plain, chat, or text with {prompt} in it. Default: as the run, or chat.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Length limit of the answer.")] = 256,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16, float16 or auto. Default: as the run, or auto.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cuda, cuda:1, cpu... Default: a GPU where there is one.")] = None,
) -> None:
    """Answer one prompt, greedily, printing the words as they come.

    \b
    svdtune generate runs/sorsa "Tom has 3 apples and buys 4 more. How many does he have?"
    svdtune generate smollm2-135m "What is a singular value?" --max-new-tokens 80
    """
    from transformers import TextStreamer

    from svdtune.cli.options import choose_template, placement
    from svdtune.data import Example, prompt_ids
    from svdtune.evaluation.decoding import complete_batch, context_length, end_token_ids
    from svdtune.evaluation.items import Item, check_items
    from svdtune.export import find_source, open_source

    found = find_source(source, adapter)
    loaded = open_source(found, **placement(dtype, device))
    template = choose_template(found.recipe, loaded.tokenizer, template)
    tokens = prompt_ids(Example(prompt), loaded.tokenizer, template)
    check_items([Item("the prompt", prompt, tuple(tokens), "")], max_new_tokens, context_length(loaded.model))
    ends = end_token_ids(loaded.model, loaded.tokenizer)
    streamer = TextStreamer(loaded.tokenizer, skip_prompt=True, skip_special_tokens=True)
    complete_batch(loaded.model, [tokens], max_new_tokens, ends, ends[0], streamer)
