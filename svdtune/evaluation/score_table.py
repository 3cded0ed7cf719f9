"""The scores in a run's model card: one line for every finished evaluation in the run folder."""

import json
from pathlib import Path
from typing import Any

from svdtune.methods.files.card import add_section
from svdtune.training.folder import trained_weights


def add_scores(run: Path, adapter: Path) -> None:
    """Bring the section "Scores" of an adapter's card up to date with the run's evaluations."""
    found = {path.parent.name: json.loads(path.read_text("utf-8")) for path in run.glob("evaluations/*/result.json")}
    now = trained_weights(run)  # another run's that was overwritten say nothing of these
    found = {name: result for name, result in found.items() if now is None or result.get("weights", now) == now}
    lines = [line for name in sorted(found) if "n" in found[name] for line in _lines(name, found[name])]
    if lines:
        head = "| evaluation | items | score | value | 95 % interval |\n|---|---:|---|---:|---:|\n"
        add_section(adapter, "Scores", head + "\n".join(lines))


def _lines(name: str, result: dict[str, Any]) -> list[str]:
    scores = {f"accuracy ({mode})": result[mode] for mode in ("strict", "paper") if result.get(mode)}
    rows = [(label, f"{score['accuracy']:.1%}", score["interval"], "{:.1%}") for label, score in scores.items()]
    for label, metric in (result.get("metrics") or {}).items():
        known = isinstance(metric, dict)
        value, interval = (metric["value"], metric.get("interval")) if known else (metric, None)
        rows.append((label, f"{value:.4f}", interval, "{:.4f}"))
    lines = []
    for label, value, interval, form in rows:
        spread = " to ".join(form.format(interval[end]) for end in ("low", "high")) if interval else ""
        lines.append(f"| {name} | {result['n']:,} | {label} | {value} | {spread} |")
    return lines
