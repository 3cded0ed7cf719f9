"""`svdtune recipes`: the recipes and studies that come with svdtune."""

from pathlib import Path
from typing import Annotated

import typer

from svdtune.cli.outcome import for_json

app = typer.Typer(add_completion=False, help="List, show or copy the recipes and studies that come with svdtune.")

Name = Annotated[str, typer.Argument(help="A name of the list, such as small.", show_default=False)]


@app.callback(invoke_without_command=True)
def _default(ctx: typer.Context) -> None:
    if ctx.invoked_subcommand is None:
        list_()


@app.command("list")
def list_() -> None:
    """List them by name, each with its first line.

    \b
    svdtune recipes list
    svdtune train small
    """
    from svdtune.registry import has_lab
    from svdtune.training.collection import first_words, shipped

    for verb, kind in (("train", "recipe"), *((("study", "study"),) if has_lab() else ())):
        found = shipped(kind)
        for_json({"verb": verb, "names": list(found)})
        width = max(map(len, found), default=0)
        typer.echo(f"for svdtune {verb}:")
        for name, path in found.items():
            typer.echo(f"  {name:{width}}  {first_words(path)}")


@app.command()
def show(name: Name) -> None:
    """Print a recipe as one file, with all that it takes from others.

    \b
    svdtune recipes show sara/llama-7b-math-sara
    """
    from svdtune.training.collection import find_file, whole_text

    text = whole_text(find_file(name, "recipe"))
    for_json({"name": name, "text": text})
    typer.echo(text, nl=False)


@app.command()
def write(
    name: Name,
    output: Annotated[Path | None, typer.Option(help="The file; NAME.yaml by default.", show_default=False)] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that is there.")] = False,
) -> None:
    """Write a recipe as one file of your own, to change.

    \b
    svdtune recipes write small --output mine.yaml
    """
    from svdtune.system import check_new_file, explain_write_errors, replace_text
    from svdtune.training.collection import find_file, whole_text

    found = find_file(name, "recipe")
    output = output or Path(found.name)
    check_new_file(output, overwrite)
    with explain_write_errors(output):
        replace_text(output, whole_text(found))
    for_json({"name": name, "recipe": output})
    typer.echo(f"written {output}; train it with: svdtune train {output}")
