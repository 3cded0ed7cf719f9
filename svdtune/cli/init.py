"""`svdtune init`: a new adapter for a model that need not fit into memory."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer()


@app.command()
def init(
    model: Annotated[str, typer.Argument(help="A model folder, a .gguf file, a hub name, or smollm2-135m.")],
    output: Annotated[Path, typer.Option(help="Adapter folder to create.")],
    plan: Annotated[Path | None, typer.Option(help="What `svdtune plan --json` wrote; instead of the rest.")] = None,
    method: Annotated[str, typer.Option(help="sara, mosara or sorsa.")] = "sorsa",
    r: Annotated[int | None, typer.Option(help="One rank for every module.")] = None,
    threshold: Annotated[float | None, typer.Option(help="Share of the singular values' sum that sets ranks.")] = None,
    target_modules: Annotated[
        str | None, typer.Option(help="Comma-separated names, a regular expression or all-linear.")
    ] = None,
    compact: Annotated[
        bool, typer.Option(help="Leave frozen factors out of the file; loading recomputes them.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of what starts at random.")] = 0,
    device: Annotated[str, typer.Option(help="Where weights are decomposed: cpu or cuda.")] = "cpu",
) -> None:
    """Write a new adapter, reading one weight at a time and never building the model.

    It is what get_peft_model starts on the loaded model, to the bit on the same device. `svdtune plan` says how much memory
    it takes. Load it with PeftModel.from_pretrained(model, folder, is_trainable=True).

    \b
    svdtune init smollm2-135m --r 32 --target-modules all-linear --output adapter
    svdtune plan my-model --budget 0.1% --json plan.json
    svdtune init my-model --plan plan.json --output adapter
    """
    import torch

    from svdtune.checkpoint import open_checkpoint
    from svdtune.cli.fit import size_text
    from svdtune.cli.options import check_device
    from svdtune.cli.plan import names
    from svdtune.methods.start.disk import initialise_adapter
    from svdtune.models.loading import locate
    from svdtune.training.method import build_config

    check_device(device)
    given = {"r": r, "threshold": threshold, "target_modules": names(target_modules)}
    section = _section(plan) if plan is not None else {"name": method, **given}
    name = section.pop("name")
    options = {option: value for option, value in section.items() if value is not None}
    _check(name, options)
    config = build_config(name, options | ({"compact": True} if compact else {}))
    torch.manual_seed(seed)
    made = initialise_adapter(open_checkpoint(locate(model)), config, output, device=device)
    size = sum(file.stat().st_size for file in made.adapter.iterdir())
    typer.echo(
        f"wrote {made.adapter}: {len(made.ranks)} layers, {made.trained:,} trained and {made.frozen:,} frozen numbers, "
        f"{size_text(size)}"
    )


def _section(plan: Path) -> dict[str, Any]:
    """The `method` section of a plan's JSON."""
    from svdtune.errors import SvdtuneError

    try:
        return dict(json.loads(plan.read_text(encoding="utf-8"))["method"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SvdtuneError(f"{plan} is no plan; expected what `svdtune plan --json` writes ({error})") from error


def _check(name: str, options: dict[str, Any]) -> None:
    """Refuse settings that the method does not have, all of them at once."""
    from svdtune.errors import SvdtuneError
    from svdtune.training.method import method_problems
    from svdtune.training.problems import refuse

    if name not in ("sara", "mosara", "sorsa"):
        raise SvdtuneError(f"svdtune init starts sara, mosara and sorsa; got {name!r}")
    refuse(list(method_problems(name, options)), "svdtune init")
