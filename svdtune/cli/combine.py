"""`svdtune combine`: a weighted sum of adapters as one LoRA."""

import math
from pathlib import Path
from typing import Annotated

import typer

from svdtune.cli.outcome import for_json
from svdtune.names import number_of

app = typer.Typer()


@app.command()
def combine(
    adapters: Annotated[
        list[str], typer.Argument(metavar="ADAPTER[=WEIGHT]...", help="Run or adapter folders, each with a weight (1).")
    ],
    output: Annotated[Path, typer.Option(help="Folder to create.")],
    rank: Annotated[int | None, typer.Option(help="Cut to this rank and state the error. Default: no loss.")] = None,
    error: Annotated[
        float | None, typer.Option(help="Cut every layer to the smallest rank within this relative error.")
    ] = None,
    uniform: Annotated[
        bool, typer.Option(help="Pad all layers to one rank, as llama.cpp's own converter needs.")
    ] = False,
) -> None:
    """Write the weighted sum of adapters on one base model as one LoRA.

    The methods may differ. Exact by stacking: the rank of a layer is the sum of the adapters' ranks
    there. With --rank every layer is cut to the best approximation of that rank, and its error is
    stated.

    \b
    svdtune combine runs/first=0.7 runs/second=0.3 --output combined
    svdtune combine first second=-0.5 --output combined --rank 16
    """
    from svdtune.api.adapters import combine as write
    from svdtune.cli.export import summary
    from svdtune.errors import SvdtuneError

    weights: dict[str | Path, float] = {}
    for given in adapters:
        name, weight = weight_of(given)
        if name in weights:
            raise SvdtuneError(f"{name} is named twice; give it one weight")
        weights[name] = weight
    made = write(weights, output, rank=rank, error=error, uniform=uniform)
    for_json(made)
    typer.echo(summary(made))


def weight_of(given: str) -> tuple[str, float]:
    """The folder and the weight in "folder=0.7"; a folder alone has the weight 1.

    Raises:
        SvdtuneError: what follows the equals sign is no number.
    """
    from svdtune.errors import SvdtuneError

    if "=" not in given or Path(given).exists():
        return given, 1.0
    name, _, text = given.rpartition("=")
    weight = number_of(text)
    if weight is None or not math.isfinite(weight):
        raise SvdtuneError(f"{given!r}: expected ADAPTER=WEIGHT with a number, such as {name}=0.5; got {text!r}")
    return name, float(weight)
