"""`svdtune plan`: ranks, parameters and memory of an adapter before anything trains."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from svdtune.checkpoint import Checkpoint
    from svdtune.planning import Plan

_DTYPES = ("float32", "bfloat16", "float16", "int8", "int4")
_BARS = "▁▂▃▄▅▆▇█"


app = typer.Typer()


@app.command()
def plan(
    model: Annotated[
        str,
        typer.Argument(help="A model folder, a .gguf file, a hub name, smollm2-135m, or a shape such as llama-70b."),
    ],
    method: Annotated[str, typer.Option(help="sara, mosara, sorsa or lora.")] = "sara",
    threshold: Annotated[float | None, typer.Option(help="Share of the singular values' sum that sets ranks.")] = None,
    budget: Annotated[str | None, typer.Option(help="Most parameters to train: 500k, 1.5M, or a share, 0.1%.")] = None,
    match_lora: Annotated[int | None, typer.Option(help="Train no more than a LoRA of this rank would.")] = None,
    r: Annotated[int | None, typer.Option(help="One rank for every module.")] = None,
    target_modules: Annotated[
        str | None, typer.Option(help="Comma-separated names, a regular expression or all-linear.")
    ] = None,
    exclude_modules: Annotated[str | None, typer.Option(help="Names or an expression to leave out.")] = None,
    fused_slices: Annotated[
        list[str] | None, typer.Option(help="Slices of fused projections: auto, or such as c_attn=q,v.")
    ] = None,
    num_heads: Annotated[int, typer.Option(help="Mo-SARA's heads.")] = 5,
    gate: Annotated[str, typer.Option(help="Mo-SARA's gate: softmax, top1 or none.")] = "softmax",
    batch_size: Annotated[
        int, typer.Option("--batch-size", "--batch", help="Sequences a device computes at once.")
    ] = 1,
    length: Annotated[int, typer.Option(help="Tokens a sequence.")] = 512,
    accumulation: Annotated[int, typer.Option(help="Batches before a step of the optimizer.")] = 1,
    dtype: Annotated[str, typer.Option(help=f"Of the frozen base: {', '.join(_DTYPES)}.")] = "bfloat16",
    quantize: Annotated[str | None, typer.Option(help="4bit or 8bit: the base's linear weights.")] = None,
    gradient_checkpointing: Annotated[bool, typer.Option(help="Compute activations again.")] = False,
    devices: Annotated[int, typer.Option(help="GPUs that train together.")] = 1,
    strategy: Annotated[str | None, typer.Option(help="ddp, zero2, fsdp2 or zero3.")] = None,
    offload: Annotated[bool, typer.Option(help="Keep in the host's memory what the strategy can.")] = False,
    memory: Annotated[
        float | None, typer.Option(help="GiB of one device: whether it fits, and the cheapest setting that does.")
    ] = None,
    link: Annotated[float | None, typer.Option(help="GB/s that a device receives from others (200).")] = None,
    device: Annotated[str, typer.Option(help="Where weights are decomposed: cpu or cuda.")] = "cpu",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the plan here.")] = None,
    chart: Annotated[Path | None, typer.Option(help="Draw rank by layer here (.svg, .png or .pdf).")] = None,
) -> None:
    """Show ranks, trained parameters, memory and time, reading one weight at a time and never building the model.

    Examples:

      svdtune plan smollm2-135m --method sara --threshold 0.01

      svdtune plan meta-llama/Llama-2-7b-hf --method sara --budget 0.07% --json plan.json --chart ranks.svg

      svdtune plan ./model --method sorsa --match-lora 64 --target-modules all-linear

      svdtune plan openai-community/gpt2-medium --threshold 0.012 --fused-slices c_attn=q,v

      svdtune plan llama-70b --method sorsa --r 128 --target-modules all-linear --devices 8 --memory 80 --batch 8 --length 2048
    """
    from svdtune.cli.fit import Fitting, setting_of
    from svdtune.cli.options import check_device
    from svdtune.planning import draw, make_plan
    from svdtune.system import write_json

    check_device(device)
    setting = setting_of(
        strategy,
        devices,
        memory,
        dtype,
        quantize,
        batch_size=batch_size,
        length=length,
        accumulation=accumulation,
        gradient_checkpointing=gradient_checkpointing,
        offload=offload,
    )
    if (threshold, budget, match_lora, r) == (None, None, None, None) and method in ("sara", "mosara"):
        threshold = 0.01 if method == "sara" else 0.5
    checkpoint = _open(model, weights=r is None)
    made = make_plan(
        checkpoint,
        method,
        threshold=threshold,
        budget=budget,
        match_lora=match_lora,
        r=r,
        target_modules=names(target_modules),
        exclude_modules=names(exclude_modules),
        fused_slices=_slices(fused_slices),
        num_heads=num_heads,
        gate=gate,
        device=device,
    )
    console = Console()
    console.print(_ranks_table(made))
    console.print(_in_all(made))
    fitting = Fitting(made, checkpoint.model, setting, memory, link)
    for line in fitting.lines():
        console.print(line, highlight=False, soft_wrap=True)
    if json_file is not None:
        write_json(json_file, made.to_json() | fitting.to_json())
        console.print(f"wrote {json_file}")
    if chart is not None:
        draw(made, chart)
        console.print(f"wrote {chart}")


def _open(model: str, weights: bool) -> "Checkpoint":
    """What the argument names, with its weights where they are asked for."""
    from svdtune.checkpoint import SHAPES, open_checkpoint, open_shape
    from svdtune.models.loading import locate

    if model in SHAPES and not Path(model).exists():
        return open_shape(model)
    alone = not weights and Path(model, "config.json").is_file()  # then a configuration is enough
    return open_checkpoint(model if alone else locate(model), weights=weights)


def names(text: str | None) -> list[str] | str | None:
    """Comma-separated names as a list; anything with another special character is one regular expression."""
    from svdtune.errors import SvdtuneError

    if text is None or text == "all-linear":
        return text
    parts = [part.strip() for part in text.split(",") if part.strip()]
    plain = all(part.replace("_", "").replace(".", "").replace("-", "").isalnum() for part in parts)
    if plain:
        return parts
    try:
        re.compile(text)
    except re.error as error:
        raise SvdtuneError(f"{text!r} is neither names nor a regular expression: {error}") from error
    return text


def _slices(given: list[str] | None) -> dict[str, list[str]] | str | None:
    """`--fused-slices` as a configuration states it."""
    from svdtune.errors import SvdtuneError

    if not given:
        return None
    if given == ["auto"]:
        return "auto"
    found = {}
    for text in given:
        module, separator, parts = text.partition("=")
        if not separator or not module or not parts:
            raise SvdtuneError(
                f"--fused-slices takes auto, or a module with its slices such as c_attn=q,v; got {text!r}"
            )
        found[module] = [part.strip() for part in parts.split(",")]
    return found


def _in_all(made: "Plan") -> str:
    """What all layers train together, and their share of the adapted model."""
    return (
        f"{made.method.name}: [bold]{made.trained:,}[/] trained parameters in {len(made.layers)} modules, "
        f"{made.share:.4%} of {made.base_parameters + made.trained + made.frozen:,}"
        + (f", threshold {made.threshold:g}" if made.threshold is not None else "")
    )


def _ranks_table(made: "Plan") -> Table:
    """One row a kind of module: its ranks by depth as bars, and their range."""
    from svdtune.planning import by_depth

    table = Table("module", "rank by layer", "least", "mean", "most", title=made.model)
    for column in table.columns[2:]:
        column.justify = "right"
    kinds = by_depth(made)
    top = max(max(ranks.values()) for ranks in kinds.values())
    for kind, ranks in kinds.items():
        values = [ranks[depth] for depth in sorted(ranks)]
        bars = "".join(_BARS[min(7, 8 * value // (top + 1))] for value in values)
        table.add_row(kind, bars, str(min(values)), f"{sum(values) / len(values):.1f}", str(max(values)))
    return table
