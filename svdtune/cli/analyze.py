"""`svdtune analyze`: what happened in a run, computed from its files and written beside them."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from svdtune.cli.options import Revision, TrustRemoteCode
from svdtune.cli.outcome import for_json

if TYPE_CHECKING:
    from svdtune.analysis import RunAnalysis

app = typer.Typer()


@app.command()
def analyze(
    runs: Annotated[
        list[str], typer.Argument(help="Run folders of `svdtune train`, or untrained models.", show_default=False)
    ],
    modules: Annotated[
        list[str] | None, typer.Option(help="Only these layers, by name or pattern: q_proj, '*.0.*'. Repeatable.")
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(help="What Mo-SARA's router is asked, as in evaluate; the run's own by default. Repeatable."),
    ] = None,
    k: Annotated[
        int | None,
        typer.Option(
            min=1, help="Compare a sample of so many leading singular triplets; all by default, as SORSA has it."
        ),
    ] = None,
    figures: Annotated[
        Path | None, typer.Option(help="Of an untrained model: a folder for its figures as SVG and CSV.")
    ] = None,
    items: Annotated[int, typer.Option(min=1, help="So many items of each data set for the router.")] = 8,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Compute spectra and ranks, the trained change, and routing of finished runs.

    Writes before.json, after.json and (Mo-SARA with several heads) routing.json into RUN/analysis,
    where `svdtune report` finds them. Of an untrained model: each layer's rank at thresholds from
    0.1 to 0.9 (SARA, Figures 2 and 8). Movement during training is sampled while training: put
    `analysis: {}` into the recipe.

    Examples:

    svdtune analyze runs/sorsa

    svdtune analyze huggyllama/llama-7b --figures figures

    svdtune analyze runs/sara runs/lora --modules q_proj --modules v_proj

    svdtune analyze runs/sorsa --k 64

    svdtune analyze runs/mosara --data sara_math --items 4
    """
    from svdtune.analysis import analyze as find_out
    from svdtune.training.folder import RECIPE

    origin = {"revision": revision, "trust_remote_code": trust_remote_code}
    for run in runs:
        if not Path(run, RECIPE).is_file() and (not Path(run).exists() or Path(run, "config.json").is_file()):
            typer.echo("\n".join(_untrained(run, modules, figures, **origin)))
            continue
        found = find_out(run, modules=modules, data=data, items=items, k=k)
        for_json(found)
        typer.echo("\n".join(_lines(found)))


def _untrained(model: str, modules: list[str] | None, figures: Path | None, **origin: Any) -> Iterator[str]:
    """The rank of each kind of layer at every threshold, by depth."""
    from svdtune.analysis import base

    found = base(model, modules, **origin)
    for_json({"model": model} | found)
    yield f"{model}: {len(found['layers'])} layers; rank at θ = {', '.join(f'{t:g}' for t in found['thresholds'])}"
    yield from (f"  {name}: {', '.join(map(str, layer['k']))}" for name, layer in found["layers"].items())
    if figures is not None:
        from svdtune.reports import of_base, write_figures

        yield f"  {len(write_figures(of_base(model, found), figures))} files in {figures}"


def _lines(found: "RunAnalysis") -> Iterator[str]:
    """What the terminal shows of a run."""
    yield f"{found.run}: {len(found.before['layers'])} layers"
    if found.after is not None:
        by_change = sorted(found.after["layers"].items(), key=lambda pair: pair[1]["relative_change"])
        for word, (name, layer) in (("most", by_change[-1]), ("least", by_change[0])):
            yield f"  moved {word}: {name}, {layer['relative_change']:.3%} of its weight's norm"
    if found.unrouted is not None:
        yield f"  no routing: {found.unrouted}"
    for task, routed in (found.routing or {"tasks": {}})["tasks"].items():
        entropies = [layer["entropy"] for layer in routed["layers"].values()]
        mean = sum(entropies) / len(entropies)
        yield f"  {task}: {routed['tokens']:,} tokens, mean entropy {mean:.3f} of 1"
    yield f"  written to {found.folder}"
