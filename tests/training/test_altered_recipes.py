"""Whatever a recipe's file holds: a recipe, or a SvdtuneError."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from svdtune.errors import SvdtuneError
from svdtune.training.recipe import check_recipe, dump_recipe, load_recipe
from svdtune.training.yaml_files import read_yaml

WHOLE = """\
model: &model {name: a, dtype: auto}
method: {name: sorsa, r: 4, target_modules: [q_proj]}
data: {train: {source: arithmetic}, prompt: question, completion: solution}
training: {learning_rate: 1e-3, max_steps: 4}
output: {dir: runs/a}
"""
PIECES = [
    "&a ",
    "*a",
    "*model",
    "\t",
    "- ",
    "? ",
    "{",
    "[",
    "!!python/object:x ",
    "2020-99-99",
    "!!binary x",
    "|",
    "<<: *model\n",
]
PIECES += [
    "1e999",
    "9" * 5000,
    "\x00",
    "%YAML 9\n",
    "---\n",
    ".inf",
    "!!set {a}",
    "!!timestamp x",
    "!!float x",
    "~: ",
    "[" * 500,
]
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
ANYTHING = st.recursive(
    SCALARS, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=5), v, max_size=3)
)


def refusal(settings: dict[str, object]) -> str | None:
    """What is said of a recipe that cannot be used, None where it can."""
    try:
        check_recipe(settings)
    except SvdtuneError as error:
        return str(error)
    return None


@given(data=st.data())
def test_altered_recipes(tmp_path: Path, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(WHOLE)))
    stop = data.draw(st.integers(start, min(len(WHOLE), start + 20)))
    put_in = data.draw(st.sampled_from(PIECES) | st.text(st.characters(codec="utf-8"), max_size=4))
    path = tmp_path / "recipe.yaml"
    path.write_text(WHOLE[:start] + put_in + WHOLE[stop:], encoding="utf-8")
    try:
        recipe = load_recipe(path)
    except SvdtuneError:
        return
    assert check_recipe(read_yaml(dump_recipe(recipe), "dumped")) == recipe


@given(
    section=st.sampled_from(["model", "method", "data", "training", "evaluation", "analysis", "output"]), value=ANYTHING
)
def test_anything_in_the_place_of_a_section(section: str, value: object) -> None:
    settings = read_yaml(WHOLE, "whole") | {section: value}
    message = refusal(settings)
    assert message is None or section in message


@given(
    name=st.sampled_from(["learning_rate", "max_steps", "batch_size", "warmup", "report_to", "seed", "precision"]),
    value=ANYTHING,
)
def test_anything_in_the_place_of_a_setting(name: str, value: object) -> None:
    settings = read_yaml(WHOLE, "whole")
    settings["training"][name] = value
    message = refusal(settings)
    assert message is None or f"training.{name}" in message


@given(name=st.sampled_from(["r", "target_modules", "dropout", "gamma", "rank_pattern", "bias"]), value=ANYTHING)
def test_anything_in_the_place_of_a_methods_setting(name: str, value: object) -> None:
    settings = read_yaml(WHOLE, "whole")
    settings["method"][name] = value
    message = refusal(settings)
    assert message is None or name in message


@given(
    depth=st.integers(3, 40),
    width=st.integers(2, 20),
    kind=st.sampled_from(["list", "mapping", "merge"]),
)
def test_anchors_that_blow_up(tmp_path: Path, depth: int, width: int, kind: str) -> None:
    """Some bytes that stand for width^depth values: refused or read, in no time."""
    lines = ["a0: &a0 [x]" if kind == "list" else "a0: &a0 {x: 1}"]
    for level in range(1, depth):
        above = f"*a{level - 1}"
        inner = {
            "list": f"[{', '.join([above] * width)}]",
            "mapping": "{" + ", ".join(f"k{n}: {above}" for n in range(width)) + "}",
            "merge": "{" + f"<<: [{', '.join([above] * width)}]" + ", y: 1}",
        }[kind]
        lines.append(f"a{level}: &a{level} {inner}")
    path = tmp_path / "recipe.yaml"
    path.write_text("\n".join(lines))
    with pytest.raises(SvdtuneError, match=r"recipe\.yaml"):
        load_recipe(path)
