"""`svdtune plan`: ranks, parameters and memory of an adapter before anything trains."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from svdtune.cli.options import Revision, TrustRemoteCode
from svdtune.cli.outcome import for_json
from svdtune.system import open_console

if TYPE_CHECKING:
    from svdtune.cli.fit import Fitting
    from svdtune.planning import Plan

_DTYPES = ("float32", "bfloat16", "float16", "int8", "int4")
_BARS = "▁▂▃▄▅▆▇█"

RecipeOrModel = Annotated[
    str,
    typer.Argument(
        help="A recipe (.yaml, or by name: small), a model folder, .gguf file, hub name, smollm2-135m or "
        "shape (llama-70b)."
    ),
]

app = typer.Typer()


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def plan(
    ctx: typer.Context,
    model: RecipeOrModel,
    method: Annotated[
        str | None, typer.Option(help="sara (where no recipe says), mosara, sorsa, or any of PEFT.")
    ] = None,
    threshold: Annotated[float | None, typer.Option(help="Share of the singular values' sum that sets ranks.")] = None,
    budget: Annotated[str | None, typer.Option(help="Most parameters to train: 500k, 1.5M, or a share, 0.1%.")] = None,
    match_lora: Annotated[int | None, typer.Option(help="Train no more than a LoRA of this rank would.")] = None,
    ranks: Annotated[
        str, typer.Option(help="How a spectrum gives a rank: sara (by threshold), entropy or stable.")
    ] = "sara",
    r: Annotated[int | None, typer.Option(help="One rank for every module.")] = None,
    target_modules: Annotated[
        str | None, typer.Option(help="Comma-separated names, a regular expression or all-linear.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", "--batch", help="Sequences a device computes at once (1).")
    ] = None,
    length: Annotated[int | None, typer.Option(help="Tokens a sequence (512).")] = None,
    accumulation: Annotated[int | None, typer.Option(help="Batches before a step of the optimizer (1).")] = None,
    dtype: Annotated[str | None, typer.Option(help=f"Of the frozen base: {', '.join(_DTYPES)} (bfloat16).")] = None,
    optimizer: Annotated[str | None, typer.Option(help="Such as adamw_bnb_8bit (adamw_torch).")] = None,
    quantize: Annotated[str | None, typer.Option(help="4bit or 8bit: the base's linear weights.")] = None,
    gradient_checkpointing: Annotated[bool | None, typer.Option(help="Compute activations again.")] = None,
    devices: Annotated[int, typer.Option(help="GPUs that train together.")] = 1,
    strategy: Annotated[str | None, typer.Option(help="ddp, zero2, fsdp2 or zero3.")] = None,
    offload: Annotated[bool, typer.Option(help="Keep in the host's memory what the strategy can.")] = False,
    memory: Annotated[
        float | None, typer.Option(help="GiB of one device: whether it fits, and the cheapest setting that does.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="Where weights are decomposed, such as cpu (a GPU where there is one).")
    ] = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    chart: Annotated[Path | None, typer.Option(help="Draw rank by layer here (.svg, .png or .pdf).")] = None,
) -> None:
    """Show ranks, trained parameters and memory, reading one weight at a time and never building
    the model.

    With a recipe, this plans what `svdtune train` would train, with the same settings on the
    command line. With a model, the method's settings are given in the same words. The batch, the
    length and the like are the recipe's where no option is given.

    Examples:

      svdtune plan small --method.r 16 --memory 24

      svdtune plan smollm2-135m --method sara --threshold 0.01 --method.use_lambda false

      svdtune plan meta-llama/Llama-2-7b-hf --method sara --budget 0.07% --json plan.json --chart
      ranks.svg

      svdtune plan ./model --method lora --ranks entropy --budget 0.5% --json plan.json

      svdtune plan llama-70b --method sorsa --r 128 --target-modules all-linear --devices 8 --memory
      80 --batch 8 --length 2048
    """
    from svdtune.cli.adapter import asked, names, options_of
    from svdtune.cli.fit import Fitting, setting_of
    from svdtune.planning import plan as make_plan
    from svdtune.spectra.devices import check_device

    check_device(device)
    sizes: dict[str, Any] = {"threshold": threshold, "budget": budget, "match_lora": match_lora}
    _check_one(sizes | {"r": r})
    origin = {"revision": revision, "trust_remote_code": trust_remote_code}
    settings = {"r": r, "target_modules": names(target_modules)}
    wanted = asked("svdtune plan", model, "sara", method, settings, ctx.args, options_of(ctx), **origin)
    assert wanted.config is not None
    by_spectrum = getattr(wanted.config, "threshold", None) is not None
    checkpoint = wanted.open(weights=by_spectrum or ranks != "sara" or any(size is not None for size in sizes.values()))
    step = {"batch_size": batch_size, "length": length, "accumulation": accumulation, "dtype": dtype}
    step |= {"gradient_checkpointing": gradient_checkpointing, "offload": offload, "optimizer": optimizer}
    setting = setting_of(strategy, devices, memory, quantize, wanted.recipe, checkpoint.model, **step)
    made = make_plan(checkpoint, wanted.config, **sizes, ranks=ranks, device=device)
    _tell(made, Fitting(made, checkpoint.model, setting, memory), chart)


def _tell(made: "Plan", fitting: "Fitting", chart: Path | None) -> None:
    """Print a plan, and write the files that were asked for."""
    from svdtune.planning import draw_chart

    console = open_console()
    if made.sites.ranks:
        console.print(_ranks_table(made))
    console.print(_in_all(made))
    for line in fitting.lines():
        console.print(line, highlight=False, soft_wrap=True)
    for_json(made.to_json() | fitting.to_json())
    if chart is not None:
        draw_chart(made, chart)
        console.print(f"wrote {chart}")


def _check_one(sizes: dict[str, Any]) -> None:
    from svdtune.errors import SvdtuneError

    given = [f"--{name.replace('_', '-')}" for name, value in sizes.items() if value is not None]
    if len(given) > 1:
        raise SvdtuneError(
            f"give at most one of --threshold, --budget, --match-lora and --r; got {' and '.join(given)}"
        )


def _in_all(made: "Plan") -> str:
    """What all layers train together, and their share of the adapted model."""
    return (
        f"{made.method}: [bold]{made.trained:,}[/] trained parameters in {len(made.sites)} modules, "
        f"{made.share:.4%} of {made.sites.count.total:,}"
        + (f", threshold {made.threshold:g}" if made.threshold is not None else "")
    )


def _ranks_table(made: "Plan") -> Table:
    """One row a kind of module: its ranks by depth as bars, and their range."""
    from svdtune.planning import by_depth

    table = Table("module", "rank by layer", "least", "mean", "most", title=made.model)
    for column in table.columns[2:]:
        column.justify = "right"
    kinds = by_depth(made)
    top = max(max(map(max, ranks.values())) for ranks in kinds.values())
    for kind, ranks in kinds.items():
        values = [rank for depth in sorted(ranks) for rank in ranks[depth]]
        heights = (sum(ranks[depth]) // len(ranks[depth]) for depth in sorted(ranks))
        bars = "".join(_BARS[min(7, 8 * height // (top + 1))] for height in heights)
        table.add_row(kind, bars, str(min(values)), f"{sum(values) / len(values):.1f}", str(max(values)))
    return table
