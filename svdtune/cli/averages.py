"""The averages that `evaluate` shows and keeps where it scores several data sets."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from svdtune.evaluation import Evaluation


def report_averages(results: "dict[str, Evaluation]", path: Path) -> str:
    """Average over the sets in each mode, write `path`, and return what the terminal shows.

    Sets whose items are neither right nor wrong (E2E) are in no average.
    """
    from svdtune.evaluation.averages import average, average_json
    from svdtune.system import write_json

    kept: dict[str, Any] = {"sets": {name: _set_json(result) for name, result in results.items()}}
    lines = []
    for mode in ("strict", "paper"):
        scores = {name: (getattr(result, mode), result) for name, result in results.items() if getattr(result, mode)}
        if not scores:
            continue
        samples = {name: result.n * result.settings.get("samples", 1) for name, (_, result) in scores.items()}
        found = average({name: (score.correct, samples[name]) for name, (score, _) in scores.items()})
        kept[mode] = average_json(found) | {"over": list(scores)}
        for kind, value, (low, high) in (
            ("macro", found.macro, found.macro_interval),
            ("micro", found.micro, found.micro_interval),
        ):
            lines.append(
                f"{kind} average ({mode}) {value:.1%}, 95 % interval {low:.1%} to {high:.1%}; "
                f"{len(scores)} sets, {found.n} items"
            )
    write_json(path, kept)
    return "\n".join([*lines, f"averages: {path}"])


def _set_json(result: "Evaluation") -> dict[str, Any]:
    scores = {mode: getattr(result, mode) for mode in ("strict", "paper")}
    return {"n": result.n, "folder": str(result.folder)} | {
        mode: score and {"correct": score.correct, "accuracy": score.accuracy, "interval": score.interval._asdict()}
        for mode, score in scores.items()
    }
