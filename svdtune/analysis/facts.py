"""What the files of a run say, whichever of them there are: settings, log, scores, and what
`svdtune analyze` left."""

from pathlib import Path
from typing import Any, TypedDict

from svdtune.analysis.records import (
    RESULT,
    After,
    Before,
    LogLine,
    Record,
    RoutingRecord,
    Sample,
    Scores,
    Summary,
    read_lines,
    read_record,
    spelled_out,
)
from svdtune.errors import SvdtuneError
from svdtune.evaluation.averages import average, no_average
from svdtune.names import meant
from svdtune.training.folder import ANALYSIS, LOG, RECIPE, SUMMARY, read_run
from svdtune.training.method import FULL, build_config
from svdtune.training.movement import DURING
from svdtune.training.recipe import Recipe

AVERAGE = "average of sets"
# What is read of each part, what it is called, and the command that makes it.
_PARTS: dict[str, tuple[type[Record], str]] = {
    "before": (Before, "spectra and ranks before training: svdtune analyze RUN"),
    "after": (After, "the trained change: svdtune analyze RUN"),
    "routing": (RoutingRecord, "routing of Mo-SARA's heads: svdtune analyze RUN --items 8"),
}


class RunScore(TypedDict):
    """One score of a run: a share or another metric, its 95 % interval (None if unknown), and how
    many items it is over."""

    value: float
    low: float | None
    high: float | None
    n: int


class Facts(TypedDict):
    """A run.

    Attributes:
        name: of its folder.
        folder: the folder.
        method: its method's name.
        settings: what a comparison is made by: threshold, heads, rank, scale (α / r), first and
            last layer; None where it has none.
        summary: of `training.json`.
        log: lines of the log.
        scores: by label, such as "gsm8k-number (strict)".
        before, during, after, routing: what analysis left; None where it did not.
        missing: a sentence for each part that is not there.
    """

    name: str
    folder: str
    method: str
    settings: dict[str, Any]
    summary: dict[str, Any]
    log: list[dict[str, Any]]
    scores: dict[str, RunScore]
    before: dict[str, Any] | None
    during: list[dict[str, Any]] | None
    after: dict[str, Any] | None
    routing: dict[str, Any] | None
    missing: list[str]


def read_facts(run: str | Path) -> Facts:
    """Read a run folder; what is missing or damaged is named in `missing`, and everything else is
    still read.

    Raises:
        SvdtuneError: the folder is no run.
    """
    folder = Path(run).expanduser()
    if not folder.exists():
        raise SvdtuneError(f"there is no run {run}{meant(run, folders=True)}")
    if not (folder / RECIPE).is_file():
        raise SvdtuneError(f"{run} is not a run of svdtune: it has no {RECIPE}; name the folder `svdtune train` made")
    recipe = read_run(folder)
    missing: list[str] = []
    parts = {part: read_record(folder, f"{ANALYSIS}/{part}.json", kind, missing) for part, (kind, _) in _PARTS.items()}
    summary = read_record(folder, SUMMARY, Summary, missing)
    scores = _scores(folder, missing, (summary or {}).get("weights"))
    samples = read_lines(folder, DURING, Sample, missing)
    facts = Facts(
        name=folder.resolve().name,
        folder=str(run),
        method=recipe.method.name,
        settings=_settings(recipe),
        summary=summary or {},
        log=read_lines(folder, LOG, LogLine, missing),
        scores=scores,
        during=samples or None,
        missing=missing,
        before=parts["before"],
        after=parts["after"],
        routing=parts["routing"],
    )
    wants_routing = facts["settings"]["heads"] not in (None, 1)
    # What a router changes depends on the token: it has routing in the place of a change.
    wanted = ("before", "routing" if wants_routing else "after")
    missing += [_PARTS[part][1] for part in wanted if parts[part] is None]
    if summary is None:
        missing.append("the result: the run is not finished (svdtune train RECIPE --resume)")
    if not facts["log"]:
        missing.append("loss and gradient norm: there is no train_log.jsonl")
    if not scores:
        missing.append("scores: svdtune evaluate RUN")
    if not samples and not wants_routing:
        missing.append("movement during training: an `analysis` section in the recipe, before training")
    return facts


def _settings(recipe: Recipe) -> dict[str, Any]:
    """What comparisons go by, defaults of the method included."""
    config = None if recipe.method.name == FULL else build_config(recipe.method.name, recipe.method.options)
    rank, alpha = getattr(config, "r", None), getattr(config, "lora_alpha", None)
    chosen = getattr(config, "layers_to_transform", None)
    chosen = [chosen] if isinstance(chosen, int) else chosen
    return {
        "threshold": getattr(config, "threshold", None),
        "heads": getattr(config, "num_heads", None),
        "rank": rank,
        "scale": alpha / rank if alpha and rank else None,
        "variant": _variant(config),
        "layers": [min(chosen), max(chosen)] if chosen else None,
        "model": recipe.model.name,
        "seed": recipe.training.seed,
    }


def _variant(config: Any) -> str | None:
    """The name under which a variant of LoRA is known."""
    start = getattr(config, "init_lora_weights", None)
    if getattr(config, "use_dora", False):
        return "DoRA"
    return "PiSSA" if isinstance(start, str) and start.startswith("pissa") else None


def _scores(folder: Path, problems: list[str], weights: str | None) -> dict[str, RunScore]:
    """The scores of every finished evaluation of these weights, and their average over sets where
    there are several."""
    found: dict[str, RunScore] = {}
    sets: dict[str, tuple[str, str]] = {}
    counts: dict[str, dict[str, tuple[int, int]]] = {"strict": {}, "paper": {}}
    for path in sorted(folder.glob(f"evaluations/*/{RESULT}")):
        name = spelled_out(path.parent.name)
        result = read_record(folder, str(path.relative_to(folder)), Scores, problems)
        if result is None or result["n"] is None:
            continue
        if weights is not None and (result["weights"] or weights) != weights:
            problems.append(f"the scores in {name}, which are of other weights: svdtune evaluate RUN --restart")
            continue
        settings = result["settings"]
        sets[name] = ((settings["data"] or {}).get("source") or name, result["task"] or "")
        for mode in counts:
            if score := result[mode]:
                found[f"{name} ({mode})"] = _score(score["accuracy"], score["interval"], result["n"])
                counts[mode][name] = (score["correct"], result["n"] * settings["samples"])
        for metric, value in (result["metrics"] or {}).items():
            if isinstance(value, dict):
                found[f"{name} {metric}"] = _score(value["value"], value["interval"], result["n"])
    for mode, counted in counts.items():
        if len(counted) < 2:
            continue
        if apart := no_average([sets[name] for name in counted]):
            problems.append(f"an average ({mode}): {apart}")
        else:
            mean = average(counted)
            found[f"{AVERAGE} ({mode})"] = _score(mean.macro, mean.macro_interval._asdict(), mean.n)
    return found


def _score(value: float, interval: dict[str, float | None] | None, n: int) -> RunScore:
    interval = interval or {}
    return RunScore(value=value, low=interval.get("low"), high=interval.get("high"), n=n)
