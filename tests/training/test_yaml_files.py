"""Settings are YAML 1.2: what YAML 1.1 reads otherwise is a text, or refused."""

import math
from typing import Any

import pytest

from svdtune.errors import SvdtuneError
from svdtune.training.recipe import check_recipe
from svdtune.training.yaml_files import read_yaml, write_yaml

CORE = {
    "null": None, "~": None, "": None, "true": True, "FALSE": False, "12": 12, "010": 10, "+3": 3, "0o17": 15,
    "0x1F": 31, "1e-4": 1e-4, "1E4": 1e4, "1.e3": 1e3, ".5": 0.5, ".5e3": 500.0, "-.INF": -math.inf,
    "!!str 12": "12", "!!float 12": 12.0, "!!int 0o17": 15,
}  # fmt: skip
# A number, a truth value or a date to a reader of YAML 1.1.
TEXTS = [
    "1_000", "1_", "1_0.5", "1._5", "0x_ff", "0o1_7", "0b101", "+0x1", "-0o7", "1:30", "1:30:20", "190:20:30.15",
    "yes", "No", "on", "OFF", "y", "2026-01-02", "2026-01-02T10:20:30Z", "2026-1-2 10:20:30", "=", "1,000",
]  # fmt: skip
TAGS = ["!!int 1_000", "!!float 1_0", "!!int 1:30", "!!bool yes", "!!null x", "!!timestamp 2026-01-02", "!!binary aGk=",
        "!!set {a}", "!!omap []", "!mine x", "! 12"]  # fmt: skip


def whole(training: dict[str, Any]) -> dict[str, Any]:
    """A recipe's sections with these settings of training."""
    sections = {"model": "a", "method": {"name": "sorsa", "r": 4}, "data": {"train": "arithmetic"}}
    return sections | {"training": {"learning_rate": 1e-3} | training, "output": {"dir": "runs/a"}}


@pytest.mark.parametrize("written", CORE)
def test_the_core_schema(written: str) -> None:
    found = read_yaml(f"a: {written}", "it")["a"]
    assert found == CORE[written]
    assert type(found) is type(CORE[written])


@pytest.mark.parametrize("written", TEXTS)
def test_what_only_yaml_1_1_reads_is_a_text(written: str) -> None:
    assert read_yaml(f"a: {written}", "it") == {"a": written}


@pytest.mark.parametrize("setting", ["max_steps", "learning_rate", "packing", "seed"])
@pytest.mark.parametrize("written", [text for text in TEXTS if text != "1,000"])
def test_and_no_number_or_truth_value(setting: str, written: str) -> None:
    with pytest.raises(SvdtuneError, match=rf"training\.{setting}: expected a valid "):
        check_recipe(whole(read_yaml(f"{setting}: {written}", "it")))


@pytest.mark.parametrize("written", TAGS)
def test_tags_outside_the_core_schema(written: str) -> None:
    with pytest.raises(
        SvdtuneError, match=r"^it line 2 has the tag '.*', which is none of YAML 1\.2's .*; take the tag out$"
    ):
        read_yaml(f"b: 1\na: {written}", "it")


def test_another_version_of_yaml() -> None:
    assert read_yaml("%YAML 1.2\n---\na: yes\n", "it") == {"a": "yes"}
    with pytest.raises(SvdtuneError, match=r"^it line 2 asks for YAML 1\.1; settings are YAML 1\.2: take %YAML 1\.1"):
        read_yaml("%YAML 1.1\n---\na: yes\n", "it")


@pytest.mark.parametrize("text", [*CORE, *TEXTS])
def test_texts_come_back_as_texts(text: str) -> None:
    assert read_yaml(write_yaml({"a": text}), "it") == {"a": text}
