"""What the demo found out, as a table."""

import os
from dataclasses import dataclass
from typing import Any

from rich.table import Table


@dataclass(frozen=True)
class Row:
    """What the demo found out about one method; accuracies with their 95 % intervals."""

    method: str
    settings: dict[str, Any]
    learning_rate: float
    trained_parameters: int
    total_parameters: int
    init_seconds: float
    train_seconds: float
    before: float
    before_interval: tuple[float, float]
    after: float
    after_interval: tuple[float, float]
    adapter_bytes: int
    merged: str
    score_seconds: float
    merge_seconds: float


def table(rows: list[Row], model: str, quick: bool, seconds: float) -> Table:
    """The table of results, one row a method."""
    title = f"{model} on worded arithmetic, {seconds / 60:.1f} min on {os.cpu_count()} CPU cores"
    if quick:
        title = f"--quick: too short to learn much, shows that it runs. {title}"
    shown = Table(title=title, caption="accuracy on held-out items, with its 95 % interval")
    for name in ("method", "trained parameters", "init", "training", "before", "after", "adapter", "merged?"):
        shown.add_column(name, justify="left" if name in ("method", "merged?") else "right")
    for row in rows:
        shown.add_row(
            row.method,
            f"{row.trained_parameters:,} ({row.trained_parameters / row.total_parameters:.2%})",
            f"{row.init_seconds:.1f} s",
            f"{row.train_seconds:.0f} s",
            _percent(row.before, row.before_interval),
            _percent(row.after, row.after_interval),
            f"{row.adapter_bytes / 1e6:.1f} MB",
            row.merged,
        )
    return shown


def _percent(accuracy: float, interval: tuple[float, float]) -> str:
    low, high = interval
    return f"{accuracy:.0%} ({low:.0%} to {high:.0%})"
