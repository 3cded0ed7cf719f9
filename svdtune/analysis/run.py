"""Analyze a finished run: everything that its files tell, written into its folder."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from svdtune.analysis.after import after
from svdtune.analysis.before import before
from svdtune.analysis.routing import routing
from svdtune.analysis.weights import Opened, open_run
from svdtune.errors import SvdtuneError
from svdtune.evaluation import to_items
from svdtune.evaluation.questions import prepare, sets_to_ask
from svdtune.system import write_json
from svdtune.training.folder import ANALYSIS, RECIPE
from svdtune.training.lock import held


@dataclass(frozen=True)
class RunAnalysis:
    """What was found out about a run.

    Attributes:
        run: its folder.
        folder: where `before.json`, `after.json` and `routing.json` lie, as far as there are any.
        before: spectra and ranks of the base's layers, as `svdtune.analysis.before` gives them.
        after: the trained change by layer; None where every layer's depends on the token.
        routing: what Mo-SARA's router does; None without one, and where there is nothing to ask.
        unrouted: why there is a router and no routing.
    """

    run: Path
    folder: Path
    before: dict[str, Any]
    after: dict[str, Any] | None = None
    routing: dict[str, Any] | None = None
    unrouted: str | None = None


def analyze(
    run: str | Path,
    *,
    modules: Sequence[str] | None = None,
    data: str | Path | Sequence[str | Path] | None = None,
    items: int = 8,
    k: int | None = None,
) -> RunAnalysis:
    """Find out what happened in a finished run: spectra and ranks, the trained change, and routing,
    written into RUN/analysis, where `report` finds them.

    Args:
        run: a run folder.
        modules: names or patterns of the layers to look at ("q_proj", "*.3.*"); all trained ones by
            default.
        data: what Mo-SARA's router is asked; the run's own held-out data by default.
        items: so many items of each data set for the router.
        k: compare a sample of so many leading singular triplets of each layer; by default all of
            them, as SORSA's Eq. 7–10 have it.

    Returns:
        `folder`; `before`, spectra and ranks; `after`, by layer the relative change, ΔΣ, ΔD, the
        subspace angle in degrees and more, or None; `routing`, or None and `unrouted`, why not.

    Raises:
        SvdtuneError: there is no finished run, no layer of these names, or no such data.
    """
    if items < 1:
        raise SvdtuneError(f"items is {items}; expected at least 1 item of each data set for the router")
    if k is not None and k < 1:
        raise SvdtuneError(f"k is {k}; expected at least 1 singular triplet, or none for all")
    with held(Path(run), "analyze") if Path(run, RECIPE).is_file() else nullcontext():
        given = [data] if isinstance(data, str | Path) else data or ()
        return _analyze(run, modules, [str(each) for each in given], items, k)


def _analyze(
    run: str | Path, modules: Sequence[str] | None, data: Sequence[str], items: int, k: int | None
) -> RunAnalysis:
    opened = open_run(run, modules)
    assert opened.source.run is not None
    folder = opened.source.run / ANALYSIS
    found: dict[str, Any] = {"before": before(opened)}
    write_json(folder / "before.json", found["before"], indent=None)
    if opened.matrices:
        found["after"] = after(opened, k=k)
        write_json(folder / "after.json", found["after"], indent=None)
    if len(opened.matrices) < len(opened.layers):
        try:
            tasks = _tasks(opened, data, items)
        except SvdtuneError as error:
            if data:
                raise
            return RunAnalysis(opened.source.run, folder, **found, unrouted=str(error))
        found["routing"] = routing(opened, tasks)
        write_json(folder / "routing.json", found["routing"], indent=None)
    return RunAnalysis(opened.source.run, folder, **found)


def _tasks(run: Opened, data: Sequence[str], items: int) -> dict[str, list[tuple[int, ...]]]:
    """The first prompts of each data set, in the form in which `evaluate` asks them."""
    recipe, tokenizer = run.source.recipe, run.loaded.tokenizer
    asked_for: Sequence[str | None] = data or [None]
    names = [name for given in asked_for for name in sets_to_ask(recipe, given, None)]
    tasks = {}
    for name in names:
        asked = prepare(recipe, name, limit=items)
        found = to_items(asked.examples, tokenizer, asked.form.template_for(tokenizer), asked.form.answer)
        tasks[Path(asked.rows.source).stem] = [item.tokens for item in found[:items]]
    return tasks
