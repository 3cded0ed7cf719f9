"""`svdtune plan`: ranks, parameters and memory of an adapter before anything trains."""

import json
import re
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

_BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "int8": 1.0, "int4": 0.5}
_BARS = "▁▂▃▄▅▆▇█"


app = typer.Typer()


@app.command()
def plan(
    model: Annotated[str, typer.Argument(help="A model folder, a .gguf file, a hub name, or smollm2-135m.")],
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
    batch_size: Annotated[int, typer.Option(help="Sequences a step, for the memory estimate.")] = 1,
    length: Annotated[int, typer.Option(help="Tokens a sequence, for the memory estimate.")] = 512,
    dtype: Annotated[
        str, typer.Option(help=f"Of the frozen base, for the estimate: {', '.join(_BYTES)}.")
    ] = "bfloat16",
    gradient_checkpointing: Annotated[bool, typer.Option(help="Estimate with gradient checkpointing.")] = False,
    device: Annotated[str, typer.Option(help="Where weights are decomposed: cpu or cuda.")] = "cpu",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the plan here.")] = None,
    chart: Annotated[Path | None, typer.Option(help="Draw rank by layer here (.svg, .png or .pdf).")] = None,
) -> None:
    """Show ranks, trained parameters and memory, reading one weight at a time and never building the model.

    Examples:

      svdtune plan smollm2-135m --method sara --threshold 0.01

      svdtune plan meta-llama/Llama-2-7b-hf --method sara --budget 0.07% --json plan.json --chart ranks.svg

      svdtune plan ./model --method sorsa --match-lora 64 --target-modules all-linear

      svdtune plan openai-community/gpt2-medium --threshold 0.012 --fused-slices c_attn=q,v
    """
    from svdtune.cli.asking import check_device
    from svdtune.errors import SvdtuneError
    from svdtune.models.loading import locate
    from svdtune.planning import draw, estimate, make_plan, open_checkpoint
    from svdtune.system import explain_write_errors, replace_text

    check_device(device)
    if dtype not in _BYTES:
        raise SvdtuneError(f"dtype {dtype!r} is none of {', '.join(_BYTES)}")
    if batch_size < 1 or length < 1:
        raise SvdtuneError(f"batch_size and length must be at least 1; got {batch_size} and {length}")
    if (threshold, budget, match_lora, r) == (None, None, None, None) and method in ("sara", "mosara"):
        threshold = 0.01 if method == "sara" else 0.5
    checkpoint = open_checkpoint(locate(model))
    made = make_plan(
        checkpoint,
        method,
        threshold=threshold,
        budget=budget,
        match_lora=match_lora,
        r=r,
        target_modules=_names(target_modules),
        exclude_modules=_names(exclude_modules),
        fused_slices=_slices(fused_slices),
        num_heads=num_heads,
        device=device,
    )
    console = Console()
    console.print(_ranks_table(made))
    console.print(
        f"{made.method.name}: [bold]{made.trained:,}[/] trained parameters in {len(made.layers)} modules, "
        f"{made.share:.4%} of {made.base_parameters + made.trained + made.frozen:,}"
        + (f", threshold {made.threshold:g}" if made.threshold is not None else "")
    )
    memory = estimate(
        made,
        checkpoint.model.config,
        batch_size=batch_size,
        length=length,
        bytes_per_weight=_BYTES[dtype],
        gradient_checkpointing=gradient_checkpointing,
    )
    parts = ", ".join(f"{name} {_size(size)}" for name, size in vars(memory).items())
    console.print(f"memory, about {_size(memory.total)} at {batch_size} × {length} tokens in {dtype}: {parts}")
    if json_file is not None:
        document = made.to_json() | {"memory": vars(memory) | {"total": memory.total}}
        with explain_write_errors(json_file):
            json_file.parent.mkdir(parents=True, exist_ok=True)
            replace_text(json_file, json.dumps(document, indent=2) + "\n")
        console.print(f"wrote {json_file}")
    if chart is not None:
        draw(made, chart)
        console.print(f"wrote {chart}")


def _names(text: str | None) -> list[str] | str | None:
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


def _ranks_table(made) -> Table:
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


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"
