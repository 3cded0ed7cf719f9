"""Runs of recipes as tests start and read them."""

import json
from io import StringIO
from pathlib import Path
from typing import Any

from rich.console import Console

from svdtune.training import Recipe, check_recipe, train


def go(recipe: dict[str, Any] | Recipe, **flags: Any) -> tuple[Path, str]:
    """The folder of a run, and what it printed."""
    text = StringIO()
    checked = recipe if isinstance(recipe, Recipe) else check_recipe(recipe)
    result = train(checked, console=Console(file=text, width=200), **flags)
    return result.folder, text.getvalue()


def log_of(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's log."""
    return [json.loads(line) for line in (folder / "train_log.jsonl").read_text().splitlines()]


def timeless(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What of a log is the same in two equal runs."""
    return [{key: value for key, value in line.items() if key != "tokens_per_second"} for line in log]
