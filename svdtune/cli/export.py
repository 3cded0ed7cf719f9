"""`svdtune export`: an adapter as the LoRA that does the same, for tools that know no other."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from svdtune.cli.outcome import for_json

if TYPE_CHECKING:
    from svdtune.export.lora import LoraReport

app = typer.Typer()


class ExportFormat(StrEnum):
    """What an adapter can be exported to."""

    LORA = "lora"
    GGUF = "gguf"


@app.command()
def export(
    source: Annotated[str, typer.Argument(metavar="RUN_OR_ADAPTER", help="Run or adapter folder, or a tuned model.")],
    output: Annotated[Path, typer.Option(help="Folder to create; a file for gguf.")],
    to: Annotated[ExportFormat, typer.Option(help="PEFT's folder, or llama.cpp's file.")] = ExportFormat.LORA,
    rank: Annotated[int | None, typer.Option(help="Cut to this rank and state the error. Default: no loss.")] = None,
    error: Annotated[
        float | None, typer.Option(help="Cut every layer to the smallest rank within this relative error.")
    ] = None,
    uniform: Annotated[
        bool, typer.Option(help="Pad all layers to one rank, as llama.cpp's own converter needs.")
    ] = False,
    base: Annotated[
        str | None, typer.Option(help="Base model; given, the outputs of both adapters are compared.")
    ] = None,
    start: Annotated[
        Path | None, typer.Option(help="The adapter before training, of PiSSA or OLoRA: a LoRA for --base itself.")
    ] = None,
) -> None:
    """Write an adapter as LoRA, which PEFT, vLLM and llama.cpp load without svdtune.

    SARA gives a LoRA of its own ranks, SORSA one of twice its rank, Mo-SARA with one head one of
    its own, all without loss. Mo-SARA with several heads depends on the token and is no LoRA. A
    stock LoRA can be cut, to a rank or to an error; a fully tuned model becomes a LoRA on --base.

    \b
    svdtune export runs/sorsa --to lora --output lora
    svdtune export my-adapter --to gguf --output adapter.gguf
    svdtune export my-adapter --to lora --output lora --rank 64 --base my-model
    svdtune export my-lora --output smaller --error 1e-2
    svdtune export tuned-model --base my-model --output lora --rank 16
    svdtune export trained --start start/adapter --base my-model --output lora
    """
    from svdtune.api.adapters import export_lora

    report = export_lora(source, output, rank=rank, error=error, uniform=uniform, base=base, start=start, to=to)
    for_json(report)
    typer.echo(summary(report))
    if report.difference is not None:
        typer.echo(
            f"logits against the adapter's: relative difference {report.difference.relative:.1e}; for scale, the adapter "
            f"itself changes the base's by {report.difference.effect:.1e}"
        )


def summary(report: "LoraReport") -> str:
    """What the terminal shows of an export."""
    low, high = min(report.ranks.values()), max(report.ranks.values())
    lines = [f"exported to {report.output}: LoRA of rank {high if low == high else f'{low} to {high}'}"]
    lines[0] += f" in {len(report.ranks)} layers"
    lines += [f"{layer}: relative error {error:.2e}" for layer, error in report.errors.items()]
    if not report.errors:
        lines.append("no loss: every layer adds what it added before, up to rounding")
    return "\n".join([*lines, *(f"note: {note}" for note in report.notes)])
