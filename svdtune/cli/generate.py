"""`svdtune generate`: one prompt, its answer printed while it is written; or a file of them."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from svdtune.cli.options import AdapterFolder, DeviceName, DtypeName, RunOrModel, choose_template
from svdtune.cli.outcome import for_json

if TYPE_CHECKING:
    from svdtune.models import LoadedModel
    from svdtune.training.recipe import Recipe

app = typer.Typer()


@app.command()
def generate(
    source: RunOrModel,
    prompt: Annotated[str | None, typer.Argument(help="What to ask.", show_default=False)] = None,
    data: Annotated[str | None, typer.Option(help="Ask every row of this file or data set instead.")] = None,
    output: Annotated[Path | None, typer.Option(help="With --data: the JSONL file to write.")] = None,
    field: Annotated[
        str | None, typer.Option(help="With --data: column to ask, or a text with {columns}. Default: as the run.")
    ] = None,
    adapter: AdapterFolder = None,
    template: Annotated[
        str | None, typer.Option(help="plain, chat, or text with {prompt} in it. Default: as the run, or chat.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Length limit of the answer.")] = 256,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="With --data: answers generated together. Default: 16.")
    ] = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="With --data: drop an interrupted call's answers.")
    ] = False,
    dtype: DtypeName = None,
    device: DeviceName = None,
) -> None:
    """Answer one prompt, greedily, printing the words as they come; or every row of a file.

    Rows are written as they are, with their answer as `generated`. After an interruption the same
    command goes on.

    \b
    svdtune generate runs/sorsa "Tom has 3 apples and buys 4 more. How many does he have?"
    svdtune generate smollm2-135m "What is a singular value?" --max-new-tokens 80
    svdtune generate runs/sorsa --data prompts.jsonl --output answers.jsonl
    """
    from svdtune.cli.options import answer
    from svdtune.data import Example, prompt_ids
    from svdtune.errors import SvdtuneError
    from svdtune.export import find_source, open_source
    from svdtune.models.loader import placement

    if (prompt is None) == (data is None) or (data is None) != (output is None):
        raise SvdtuneError(
            "give a prompt, or --data with --output, such as --data prompts.jsonl --output answers.jsonl"
        )
    for_rows = {"--field": field, "--batch-size": batch_size, "--restart": restart or None}
    if data is None and (idle := [option for option, value in for_rows.items() if value is not None]):
        raise SvdtuneError(
            f"{', '.join(idle)}: for the rows of --data alone; leave that out where one prompt is answered"
        )
    found = find_source(source, adapter)
    loaded = open_source(found, **placement(dtype, device))
    template = choose_template(found.recipe, loaded.tokenizer, template)
    if data is not None and output is not None:
        how = {"template": template, "max_new_tokens": max_new_tokens, "restart": restart}
        how |= {} if batch_size is None else {"batch_size": batch_size}
        _answer_rows(loaded, found.recipe, data, output, field, how)
        return
    assert prompt is not None
    said = answer(loaded, prompt_ids(Example(prompt), loaded.tokenizer, template), max_new_tokens)
    for_json({"prompt": prompt, "answer": said})


def _answer_rows(
    loaded: "LoadedModel",
    recipe: "Recipe | None",
    data: str,
    output: Path,
    field: str | None,
    how: dict[str, Any],
) -> None:
    from svdtune.data import read_rows, to_examples
    from svdtune.evaluation.answers import answer_all
    from svdtune.progress import counting
    from svdtune.system import open_console

    asked = field or (recipe.data.prompt if recipe else "prompt")
    examples = to_examples(read_rows(data), asked, source=data)
    try:
        with counting(f"answering {data}", open_console(stderr=True)) as on_progress:
            cut = answer_all(loaded, examples, output, on_progress=on_progress, **how)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted; {output}.part keeps what is done, the same command goes on") from None
    for_json({"rows": len(examples), "cut": cut, "output": output})
    typer.echo(f"{len(examples):,} answers in {output}, {cut:,} of them cut at {how['max_new_tokens']} tokens")
