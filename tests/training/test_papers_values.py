"""Every value of every recipe and study of the papers stands in one table, with where it comes
from.

`papers_values.tsv` holds patterns of recipes (recipes/sara/NAME) and of a study's arms
(studies/sara/NAME:ARM), a setting, its value, and its table in the paper, or "open". Of several
rows that match, the last holds.
"""

import csv
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest

from svdtune.training.collection import read_extended
from svdtune.training.yaml_files import read_yaml

ROOT = Path(__file__).resolve().parents[2]
PAPERS = ("sara", "sorsa")


def table() -> list[dict[str, str]]:
    with Path(__file__).with_name("papers_values.tsv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


ROWS = table()


def flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def of_recipe(path: Path) -> dict[str, Any]:
    """All that a recipe and those it extends set, and nothing that they leave to the defaults."""
    settings = read_extended(path)
    data = {part: {"source": given} if isinstance(given, str) else given for part, given in _sources(settings)}
    return dict(flat({**settings, "data": {**settings["data"], **data}}))


def _sources(settings: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return [(part, settings["data"][part]) for part in ("train", "eval") if part in settings["data"]]


def of_arm(arm: Mapping[str, Any]) -> dict[str, Any]:
    found = dict(flat({"method": arm.get("method", {}), **arm.get("settings", {})}))
    if "untrained" in arm:
        found["untrained"] = arm["untrained"]
    if "learning_rates" in arm:
        (found["training.learning_rate"],) = arm["learning_rates"]
    return found | {f"grid.{name}": values for name, values in arm.get("grid", {}).items()}


def everything() -> Iterator[tuple[str, dict[str, Any]]]:
    for paper in PAPERS:
        for path in sorted((ROOT / "recipes" / paper).glob("[!_]*.yaml")):
            yield f"recipes/{paper}/{path.stem}", of_recipe(path)
        for path in sorted((ROOT / "studies" / paper).glob("*.yaml")):
            for arm, settings in read_yaml(path.read_text("utf-8"), path.name)["arms"].items():
                yield f"studies/{paper}/{path.stem}:{arm}", of_arm(settings)


ALL = dict(everything())


def matches(row: Mapping[str, str], name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in row["where"].split("|"))


def number(value: Any) -> Any:
    """YAML reads 3e-4 as a text."""
    if isinstance(value, list):
        return [number(each) for each in value]
    try:
        return value if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return value


@pytest.mark.parametrize("name", ALL)
def test_every_value_stands_in_the_table(name: str) -> None:
    expected = {row["setting"]: row["value"] for row in ROWS if matches(row, name)}
    for setting, value in ALL[name].items():
        assert setting in expected, f"{setting} = {value!r} has no row"
        assert number(value) == number(read_yaml(expected[setting], setting)), setting
    if name.startswith("recipes/"):  # an arm has the rest from its task's recipe
        missing = {setting for setting in expected if not setting.startswith("method.")} - ALL[name].keys()
        assert not missing


def test_every_row_of_the_table_is_of_something_and_says_where_it_comes_from() -> None:
    for row in ROWS:
        assert row["source"]
        assert any(matches(row, name) and row["setting"] in settings for name, settings in ALL.items()), row
