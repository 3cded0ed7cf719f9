"""`svdtune push`: a result on the hub, with its model card."""

from typing import Annotated

import typer

from svdtune.cli.outcome import for_json

app = typer.Typer()


@app.command()
def push(
    source: Annotated[str, typer.Argument(metavar="RUN_OR_FOLDER", help="Run, adapter or merged model folder.")],
    name: Annotated[str, typer.Argument(help="owner/name on the hub.")],
    base: Annotated[str | None, typer.Option(help="The base model on the hub, where it lies on this disk.")] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
) -> None:
    """Upload a run's adapter, an adapter or a model folder, with its card.

    The card says the method, the data, the training and the scores. Checkpoints, logs and the
    recipe stay here. `svdtune chat`, `evaluate` and the rest take the base by its hub name; others
    load the adapter with `PeftModel.from_pretrained(model, "owner/name")`.

    \b
    svdtune push runs/sorsa me/my-adapter --private
    svdtune push merged me/my-model
    """
    from svdtune.export.publish import push as upload

    address = upload(source, name, base=base, private=private)
    for_json({"address": address})
    typer.echo(f"pushed to {address}")
