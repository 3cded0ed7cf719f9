"""`svdtune chat`: a conversation with a run, an adapter or a model."""

from typing import Annotated

import typer

from svdtune.cli.options import AdapterFolder, DeviceName, DtypeName, RunOrModel, choose_template
from svdtune.cli.outcome import for_json

app = typer.Typer()


@app.command()
def chat(
    source: RunOrModel,
    adapter: AdapterFolder = None,
    system: Annotated[str | None, typer.Option(help="What a chat begins with, as the system's message.")] = None,
    template: Annotated[
        str | None, typer.Option(help="chat, plain, or text with {prompt} in it. Default: as the run, or chat.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length limit of an answer.")] = 256,
    dtype: DtypeName = None,
    device: DeviceName = None,
) -> None:
    """Talk to it: a line asks, its answer is printed as it comes.

    With a chat template every answer sees the whole conversation; with another template, that of a
    run trained on single questions, each line is asked alone. An empty line begins a new
    conversation, Ctrl-D ends.

    \b
    svdtune chat runs/sorsa
    svdtune chat smollm2-135m --system "Answer in one sentence."
    """
    from svdtune.cli.options import answer
    from svdtune.data import Example, prompt_ids
    from svdtune.errors import SvdtuneError
    from svdtune.export import find_source, open_source
    from svdtune.models.loader import placement

    found = find_source(source, adapter)
    loaded = open_source(found, **placement(dtype, device))
    template = choose_template(found.recipe, loaded.tokenizer, template)
    whole = template == "chat"
    if system is not None and not whole:
        raise SvdtuneError(f"--system is for the chat template; the template here is {template!r}")
    typer.echo("each answer sees the conversation" if whole else "each line is asked alone", err=True)
    start = [{"role": "system", "content": system}] if system is not None else []
    turns = list(start)
    for line in iter(_asked, None):
        if not line.strip():
            turns = list(start)
            typer.echo("a new conversation", err=True)
            continue
        turns.append({"role": "user", "content": line})
        prompt = Example(turns if whole else line)
        said = answer(loaded, prompt_ids(prompt, loaded.tokenizer, template), max_new_tokens)
        turns.append({"role": "assistant", "content": said})
    for_json({"messages": turns})


def _asked() -> str | None:
    """The next line, None at the end."""
    try:
        return input("> ")
    except EOFError:
        return None
