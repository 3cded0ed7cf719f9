"""`svdtune new`: a model and a file become a recipe."""

from pathlib import Path
from typing import Annotated, Any

import typer

from svdtune.cli.options import Revision, TrustRemoteCode
from svdtune.cli.outcome import for_json

app = typer.Typer()


@app.command()
def new(
    model: Annotated[str, typer.Argument(help="Hub name, local folder, .gguf file, or smollm2-135m.")],
    data: Annotated[str, typer.Argument(help="File (.jsonl, .json, .csv, .tsv, .parquet, .txt) or hub name.")],
    output: Annotated[Path, typer.Option(help="The recipe to write.")] = Path("recipe.yaml"),
    method: Annotated[str, typer.Option(help="sorsa, sara, mosara, lora, any PEFT method, or full.")] = "sorsa",
    task: Annotated[str | None, typer.Option(help="sft, dpo, kto or reward; told by the columns.")] = None,
    prompt: Annotated[str | None, typer.Option(help="Column of the prompt, or a text with {columns}.")] = None,
    completion: Annotated[str | None, typer.Option(help="Column of the answer, likewise.")] = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a recipe that is there.")] = False,
) -> None:
    """Look at data, and write a recipe for it.

    It says what the rows are, how long they are, shows one with what is trained on, and reads no
    weight. `svdtune train` takes the recipe.

    Examples:

    svdtune new smollm2-135m chats.jsonl

    svdtune new smollm2-135m questions.csv --prompt question --completion answer --method sara
    """
    from svdtune.system import check_new_file, explain_write_errors, open_console, replace_text
    from svdtune.training.draft import draft

    check_new_file(output, overwrite)
    console = open_console(stderr=True)
    fields: dict[str, Any] = {"prompt": prompt, "completion": completion}
    origin = {"revision": revision, "trust_remote_code": trust_remote_code}
    made = draft(model, data, method=method, task=task, origin=origin, console=console, **fields)
    typer.echo(f"format    {made.format}")
    empty = f", {made.empty:,} with an empty answer" if made.empty else ""
    typer.echo(f"rows      {made.rows:,}, {made.tokens:,} tokens, the longest {made.longest:,}{empty}")
    if made.unread:
        typer.echo(f"unread    {', '.join(made.unread)} (columns that nothing is made of)")
    counts = [f"{count:,} at {length:,}" for length, count in sorted(made.overlong.items()) if count]
    typer.echo(f"overlong  {', '.join(counts) or 'none at 128 tokens'} (rows left out at that data.max_length)")
    with explain_write_errors(output):
        replace_text(output, made.text)
    for_json({"recipe": output} | {name: value for name, value in vars(made).items() if name != "text"})
    typer.echo(f"written   {output}; train it with: svdtune train {output}")
