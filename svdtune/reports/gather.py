"""What the page shows, put together from the runs' files: the numbers themselves, with nothing
computed but where they go."""

import re
from collections.abc import Sequence
from typing import Any

from svdtune._version import __version__
from svdtune.analysis import Facts, comparisons
from svdtune.analysis.facts import AVERAGE
from svdtune.methods.files.card import TITLES
from svdtune.names import depth_of

_MEASURES = ("relative_change", "delta_d", "delta_sigma", "angle", "condition")


def gather(runs: Sequence[Facts], title: str | None = None) -> dict[str, Any]:
    """The page's data."""
    named = _with_all_layers(_distinct(runs))
    names = dict.fromkeys(name for run in named for name in _layers(run))
    return {
        "title": title or f"svdtune: {', '.join(run['name'] for run in named)}",
        "headline": headline(named),
        "footer": f"svdtune {__version__}. Numbers are those of the runs' files.",
        "runs": [_run(run) for run in named],
        "layers": [{"name": name, "depth": depth_of(name), "kind": kind_of(name)} for name in names],
        "comparisons": comparisons(named),
    }


def headline(runs: Sequence[Facts]) -> str:
    """The result in a sentence or two: the best score where there are scores, else what was
    trained."""
    labels = list(dict.fromkeys(label for run in runs for label in run["scores"]))
    labels.sort(key=lambda label: not label.startswith(AVERAGE))
    for label in labels:
        scored = sorted((run for run in runs if label in run["scores"]), key=lambda run: -run["scores"][label]["value"])
        best, others = scored[0], scored[1:]
        score = best["scores"][label]
        text = f"{best['name']} ({title_of(best)}) has {_text(label, score)} on {label}"
        if score["low"] is not None:
            text += f", 95 % interval {_number(label, score['low'])} to {_number(label, score['high'])}, {score['n']:,} items"
        if best["summary"].get("trained_parameters"):
            text += f", with {best['summary']['trained_parameters']:,} trained parameters"
        if not others:
            return f"{text}."
        second = others[0]["scores"][label]
        apart = score["low"] is not None and second["high"] is not None and score["low"] > second["high"]
        close = "" if apart else " The intervals of the two overlap or are unknown."
        return f"{text}; next is {others[0]['name']} with {_text(label, second)}.{close}"
    done = [run for run in runs if run["summary"]]
    if not done:
        return "No run here is finished and none has scores."
    told = (f"{run['name']} ({title_of(run)}) trained {_trained(run)}" for run in done)
    return f"No run has scores yet. {'; '.join(told)}."


def title_of(run: Facts) -> str:
    """A method as people write it, with the setting that tells its runs apart."""
    settings, method = run["settings"], run["method"]
    shown = {"threshold": "θ = {:g}", "heads": "{} heads", "rank": "r = {}"}
    told = [form.format(settings[key]) for key, form in shown.items() if settings[key] is not None]
    if settings["threshold"] is not None and settings["rank"] is not None:
        told = [text for text in told if not text.startswith("θ")]
    name = settings["variant"] or {**TITLES, "full": "full fine-tuning", "lora": "LoRA"}.get(method, method)
    return ", ".join([name, *told])


def kind_of(name: str) -> str:
    """What a module is in its layer: "self_attn.q_proj"; its whole name where it is in none."""
    return re.sub(r"^.*?\.\d+\.", "", name)


def of_base(name: str, before: dict[str, Any]) -> dict[str, Any]:
    """The data of an untrained model, for its figures alone."""
    run = {"name": name, "log": {}, "during": None, "after": None, "before": before, "routing": None}
    layers = [{"name": layer, "depth": depth_of(layer), "kind": kind_of(layer)} for layer in before["layers"]]
    return {"runs": [run], "layers": layers, "comparisons": []}


def _with_all_layers(runs: Sequence[Facts]) -> list[Facts]:
    """The runs, the first with spectra having those of all runs on the same base: they are the
    base's, and runs on groups of its layers have a part of them each."""
    found = [(run["settings"]["model"], run["before"]) for run in runs if run["before"] is not None]
    if not found:
        return list(runs)
    model, first = found[0]
    layers: dict[str, Any] = {}
    for other, before in found:
        if other == model and before["thresholds"] == first["thresholds"]:
            layers = {**before["layers"], **layers}
    whole = {**first, "layers": dict(sorted(layers.items(), key=lambda pair: depth_of(pair[0])))}
    return [{**run, "before": whole} if run["before"] is first else run for run in runs]


def _distinct(runs: Sequence[Facts]) -> list[Facts]:
    seen = [run["name"] for run in runs]
    return [{**run, "name": run["folder"] if seen.count(run["name"]) > 1 else run["name"]} for run in runs]


def _layers(run: Facts) -> list[str]:
    names = [name for part in ("before", "after") for name in (run[part] or {}).get("layers", {})]
    names += [name for sample in run["during"] or [] for name in sample["layers"]]
    return names + [name for task in (run["routing"] or {}).get("tasks", {}).values() for name in task["layers"]]


def _run(run: Facts) -> dict[str, Any]:
    summary = dict(run["summary"])
    if summary.get("trained_parameters") and summary.get("total_parameters"):
        summary["share"] = summary["trained_parameters"] / summary["total_parameters"]
    kept = {key: run[key] for key in ("name", "folder", "method", "settings", "scores", "missing", "before", "after")}
    return {
        **kept,
        "routing": run["routing"],
        "title": title_of(run),
        "summary": summary,
        "log": _log(run["log"]),
        "during": _during(run["during"]),
    }


def _log(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The log by column; a measure that no line has is left out."""
    columns: dict[str, Any] = {"step": [line["step"] for line in lines]}
    for key in ("loss", "grad_norm"):
        if any(line.get(key) is not None for line in lines):
            columns[key] = [line.get(key) for line in lines]
    return columns


def _during(samples: Sequence[dict[str, Any]] | None) -> dict[str, Any] | None:
    """The samples by measure, [sample][layer], so that names stand there once."""
    if not samples:
        return None
    layers = list(dict.fromkeys(name for sample in samples for name in sample["layers"]))
    rows = [[sample["layers"].get(name) for name in layers] for sample in samples]
    values = {measure: [[layer and layer[measure] for layer in row] for row in rows] for measure in _MEASURES}
    values["orthonormality"] = [[layer and _mean(layer["orthonormality"]) for layer in row] for row in rows]
    return {"layers": layers, "steps": [sample["step"] for sample in samples], "values": values}


def _mean(errors: dict[str, float]) -> float | None:
    return sum(errors.values()) / len(errors) if errors else None


def _text(label: str, score: Any) -> str:
    return _number(label, score["value"])


def _number(label: str, value: Any) -> str:
    return f"{value:.1%}" if label.endswith(")") or "pass@" in label else f"{value:.4g}"


def _trained(run: Facts) -> str:
    summary = run["summary"]
    text = f"{summary.get('trained_parameters') or 0:,} parameters in {summary.get('steps', 0):,} steps"
    return f"{text}, mean loss {summary['loss']:.4f}" if summary.get("loss") is not None else text
