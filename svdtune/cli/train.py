"""`svdtune train`: a recipe becomes a run folder."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from svdtune.cli.outcome import for_json

app = typer.Typer()


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def train(
    ctx: typer.Context,
    recipe: Annotated[
        str, typer.Argument(help="A YAML file, or the name of a recipe that comes along.", show_default=False)
    ],
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run's latest checkpoint.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Delete an earlier run in the output folder.")] = False,
) -> None:
    """Train an adapter as a recipe says.

    Any setting can be given on the command line by its dotted path; values are YAML.

    Examples:

    svdtune train small

    svdtune train small --method.r 16 --training.learning_rate 1e-4 --output.dir runs/r16

    svdtune train small --method '{name: sara, threshold: 0.02}'

    svdtune train small --resume
    """
    from svdtune import processes
    from svdtune.training import Interrupted, load_recipe
    from svdtune.training import train as run
    from svdtune.training.checkpoints import latest_checkpoint

    loaded = load_recipe(recipe, ctx.args, begun=resume)
    again = shlex.join(["svdtune", "train", recipe, *ctx.args])
    try:
        trained = run(loaded, resume=resume, overwrite=overwrite)
    except Interrupted as stop:
        raise Interrupted(f"{stop}; go on with: {again} --resume") from None
    except KeyboardInterrupt:
        kept, _ = latest_checkpoint(Path(loaded.output.dir))
        how = f"go on from {kept.name} with: {again} --resume" if kept else f"start anew with: {again}"
        raise KeyboardInterrupt(f"interrupted; {how}") from None
    if processes.is_main():
        summary = trained.summary
        for_json(trained)
        typer.echo(f"trained {summary['steps']} steps in {summary['train_seconds']:.0f} s; saved {trained.adapter}")
