"""`svdtune analyze`: what happened in a run, computed from its files and written beside them."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from svdtune.errors import SvdtuneError

if TYPE_CHECKING:
    from svdtune.analysis import Opened

app = typer.Typer()


@app.command()
def analyze(
    runs: Annotated[list[str], typer.Argument(help="Run folders of `svdtune train`.", show_default=False)],
    modules: Annotated[
        list[str] | None, typer.Option(help="Only these layers, by name or pattern: q_proj, '*.0.*'. Repeatable.")
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(help="What Mo-SARA's router is asked, as in evaluate; the run's own by default. Repeatable."),
    ] = None,
    items: Annotated[int, typer.Option(min=1, help="So many items of each data set for the router.")] = 8,
) -> None:
    """Compute spectra and ranks, the trained change, and routing of finished runs.

    Writes before.json, after.json and (Mo-SARA with several heads) routing.json into RUN/analysis,
    where `svdtune report` finds them. Movement during training is sampled while training: put
    `analysis: {}` into the recipe.

    Examples:

    svdtune analyze runs/sorsa

    svdtune analyze runs/sara runs/lora --modules q_proj --modules v_proj

    svdtune analyze runs/mosara --data sara_math --items 4
    """
    from svdtune.analysis import open_run

    for run in runs:
        opened = open_run(run, modules)
        folder = Path(run).expanduser() / "analysis"
        typer.echo("\n".join(_analyze(opened, folder, data, items)))


def _analyze(run: "Opened", folder: Path, data: list[str] | None, items: int) -> list[str]:
    """Compute and write all parts of one run; what the terminal shows."""
    from svdtune.analysis import after, before

    found = before(run)
    _write(folder / "before.json", found)
    lines = [f"{run.source.run}: {len(run.layers)} layers"]
    if run.matrices:
        changes = after(run)
        _write(folder / "after.json", changes)
        by_change = sorted(changes["layers"].items(), key=lambda pair: pair[1]["relative_change"])
        for word, (name, layer) in (("most", by_change[-1]), ("least", by_change[0])):
            lines.append(f"  moved {word}: {name}, {layer['relative_change']:.3%} of its weight's norm")
    if len(run.matrices) < len(run.layers):
        lines += [f"  {line}" for line in _route(run, folder, data, items)]
    return [*lines, f"  written to {folder}"]


def _route(run: "Opened", folder: Path, data: list[str] | None, items: int) -> list[str]:
    """Write what the router does; its lines on the terminal."""
    from svdtune.analysis import routing

    try:
        tasks = _tasks(run, data, items)
    except SvdtuneError as error:
        if data:
            raise
        return [f"no routing: {error}"]
    found = routing(run, tasks)
    _write(folder / "routing.json", found)
    lines = []
    for task, result in found["tasks"].items():
        entropies = [layer["entropy"] for layer in result["layers"].values()]
        mean = sum(entropies) / len(entropies)
        lines.append(f"{task}: {result['tokens']:,} tokens, mean entropy {mean:.3f} of 1")
    return lines


def _tasks(run: "Opened", data: list[str] | None, items: int) -> dict[str, list[tuple[int, ...]]]:
    """The first prompts of each data set, in the form in which `evaluate` asks them."""
    from svdtune.evaluation import to_items
    from svdtune.evaluation.questions import prepare, sets_to_ask

    recipe, tokenizer = run.source.recipe, run.loaded.tokenizer
    names = [name for given in data or [None] for name in sets_to_ask(recipe, given, None)]
    tasks = {}
    for name in names:
        asked = prepare(recipe, name, limit=items)
        found = to_items(asked.examples, tokenizer, asked.form.template_for(tokenizer), asked.form.answer)
        tasks[Path(asked.rows.source).stem] = [item.tokens for item in found[:items]]
    return tasks


def _write(path: Path, found: dict[str, Any]) -> None:
    """Write a file whole or not at all."""
    from svdtune.system import explain_write_errors, replace_text

    with explain_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, json.dumps(found) + "\n")
