"""`svdtune merge`: base and adapter as one plain Transformers checkpoint, checked before it appears."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from svdtune.export import MergeReport

app = typer.Typer()


@app.command()
def merge(
    source: Annotated[str, typer.Argument(metavar="RUN_OR_ADAPTER", help="Run or adapter folder, or a model's name.")],
    output: Annotated[Path, typer.Option(help="Folder to create.")],
    adapter: Annotated[Path | None, typer.Option(help="Adapter folder, where a model was named.")] = None,
    dtype: Annotated[str, typer.Option(help="auto (the base's own), float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str | None, typer.Option(help="cuda, cuda:1, cpu... Default: a GPU where there is one.")] = None,
) -> None:
    """Write base + adapter as one checkpoint that needs neither PEFT nor svdtune.

    The checkpoint is read back and compared with the adapter's outputs before it appears under its name. Mo-SARA with
    several heads cannot be merged: its update differs from token to token.

    \b
    svdtune merge runs/sorsa --output merged
    svdtune merge my-adapter --output merged --dtype bfloat16
    """
    from svdtune.cli.asking import placement
    from svdtune.export import find_source
    from svdtune.export import merge as run_merge

    report = run_merge(find_source(source, adapter), output, **placement(dtype, device))
    typer.echo(summary(report))


def summary(report: "MergeReport") -> str:
    """What the terminal shows of a merge: where it is and how near it comes."""
    lines = [
        f"merged into {report.output} ({report.dtype})",
        f"logits against the adapter's, at {report.positions} positions: largest difference {report.max_abs:.1e}, "
        f"relative {report.relative:.1e}; same likeliest token at {report.same_token:.1%}",
        f"for scale, the adapter itself changes the base's logits by {report.effect:.1e}, relative",
    ]
    if report.relative > report.effect / 10:
        lines.append(
            f"rounding to {report.dtype} is not small beside what was trained; --dtype float32 keeps more of it"
        )
    return "\n".join(lines)
