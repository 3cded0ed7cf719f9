"""`svdtune merge`: base and adapter as one plain Transformers checkpoint, checked before it
appears."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from svdtune.cli.outcome import for_json

if TYPE_CHECKING:
    from svdtune.export import MergeReport

app = typer.Typer()


@app.command()
def merge(
    source: Annotated[str, typer.Argument(metavar="RUN_OR_ADAPTER", help="Run or adapter folder, or a model's name.")],
    output: Annotated[Path, typer.Option(help="Folder to create.")],
    adapter: Annotated[Path | None, typer.Option(help="Adapter folder, where a model was named.")] = None,
    dtype: Annotated[str, typer.Option(help="auto (the base's own), float32, bfloat16 or float16.")] = "auto",
    device: Annotated[
        str | None, typer.Option(help="Where to compare: cuda, cuda:1, cpu... Default: a GPU where there is one.")
    ] = None,
    check: Annotated[
        bool | None,
        typer.Option(
            "--check/--no-check", help="Compare logits with the adapter's. Default: if the model fits into memory."
        ),
    ] = None,
) -> None:
    """Write base + adapter as one checkpoint that needs neither PEFT nor svdtune.

    Weights are read, merged and written one at a time, so a model larger than memory merges.
    Shards, dtype, tokenizer and the base folder's other files stay as they are. What was written is
    read back and compared with the adapter's outputs before it appears under its name. Mo-SARA with
    several heads cannot be merged: its update differs from token to token.

    \b
    svdtune merge runs/sorsa --output merged
    svdtune merge my-adapter --output merged --dtype bfloat16
    svdtune merge my-model --adapter my-adapter --output merged --no-check
    """
    from svdtune.api.adapters import merge as write

    merged = write(source, output, adapter=adapter, dtype=dtype, device=device, check=check)
    for_json(merged)
    typer.echo(summary(merged))


def summary(report: "MergeReport") -> str:
    """What the terminal shows of a merge: where it is and how near it comes."""
    lines = [f"merged into {report.output} ({report.dtype}), {report.layers} weights changed"]
    found = report.comparison
    if found is None:
        return f"{lines[0]}\nlogits not compared with the adapter's: {report.unchecked}"
    lines += [
        f"logits against the adapter's, at {found.positions} positions: largest difference {found.max_abs:.1e}, "
        f"relative {found.relative:.1e}; same likeliest token at {found.same_token:.1%}",
        f"for scale, the adapter itself changes the base's logits by {found.effect:.1e}, relative",
    ]
    if found.relative > found.effect / 10:
        lines.append(
            f"rounding to {report.dtype} is not small beside what was trained; --dtype float32 keeps more of it"
        )
    return "\n".join(lines)
