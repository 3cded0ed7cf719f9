"""`svdtune init`: a new adapter for a model that need not fit into memory."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from svdtune.cli.options import Revision, TrustRemoteCode
from svdtune.cli.outcome import for_json
from svdtune.names import number_of

if TYPE_CHECKING:
    from svdtune.linalg import Components


app = typer.Typer()


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def init(
    ctx: typer.Context,
    model: Annotated[
        str, typer.Argument(help="A recipe (.yaml), or a model folder, a .gguf file, a hub name, or smollm2-135m.")
    ],
    output: Annotated[Path, typer.Option(help="Adapter folder to create.")],
    plan: Annotated[Path | None, typer.Option(help="What `svdtune plan --json` wrote; instead of the rest.")] = None,
    method: Annotated[str | None, typer.Option(help="sorsa (where no recipe says), sara, mosara or lora.")] = None,
    r: Annotated[int | None, typer.Option(help="One rank for every module.")] = None,
    threshold: Annotated[float | None, typer.Option(help="Share of the singular values' sum that sets ranks.")] = None,
    target_modules: Annotated[
        str | None, typer.Option(help="Comma-separated names, a regular expression or all-linear.")
    ] = None,
    components: Annotated[
        str, typer.Option(help="Which triplets LoRA's pissa starts from: first, middle, last (MiLoRA), or 64:128.")
    ] = "first",
    seed: Annotated[int, typer.Option(min=0, help="Of what starts at random.")] = 0,
    device: Annotated[
        str | None, typer.Option(help="Where weights are decomposed, such as cpu (a GPU where there is one).")
    ] = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Write a new adapter, reading one weight at a time and never building the model.

    It is what get_peft_model starts on the loaded model, to the bit on the same device.
    `svdtune plan` says how much memory it takes. Load it with PeftModel.from_pretrained(model,
    folder, is_trainable=True). Every setting of the method can be given as `svdtune train` takes
    it.

    \b
    svdtune init smollm2-135m --r 32 --target-modules all-linear --output adapter
    svdtune init my-model --method sara --method.init spectral --output adapter
    svdtune init my-model --method sorsa --method.compact true --output adapter
    svdtune init my-model --method lora --method.init_lora_weights pissa --r 32 --output start
    svdtune plan my-model --budget 0.1% --json plan.json
    svdtune init my-model --plan plan.json --output adapter
    """
    from svdtune.api.start import begin
    from svdtune.cli.adapter import asked, names, options_of
    from svdtune.cli.fit import size_text
    from svdtune.spectra.devices import check_device

    check_device(device)
    if plan is not None:
        method = json.dumps(_section(plan))
    origin = {"revision": revision, "trust_remote_code": trust_remote_code}
    settings = {"r": r, "threshold": threshold, "target_modules": names(target_modules)}
    wanted = asked("svdtune init", model, "sorsa", method, settings, ctx.args, options_of(ctx), **origin)
    made = begin("svdtune init", wanted, output, _band(components), seed, device)
    for_json(made)
    size = sum(file.stat().st_size for file in made.adapter.iterdir())
    typer.echo(
        f"wrote {made.adapter}: {len(made.ranks)} layers, {made.trained:,} trained and {made.frozen:,} frozen numbers, "
        f"{size_text(size)}"
    )
    if made.residual is not None:
        typer.echo(f"wrote {made.residual}: the model without what the adapter starts with; load the adapter on it")


def _band(text: str) -> "Components":
    """A word, or "64:128" as (64, 128)."""
    start, stop = map(number_of, text.split(":")) if text.count(":") == 1 else (None, None)
    return (start, stop) if isinstance(start, int) and isinstance(stop, int) else text


def _section(plan: Path) -> dict[str, Any]:
    """The `method` section of a plan's JSON."""
    from svdtune.errors import SvdtuneError

    try:
        return dict(json.loads(plan.read_text(encoding="utf-8"))["method"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SvdtuneError(f"{plan} is no plan; expected what `svdtune plan --json` writes ({error})") from error
