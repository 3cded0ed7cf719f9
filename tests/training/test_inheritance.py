"""Recipe files on top of others: what is changed, what is replaced, and what is refused."""

from pathlib import Path

import pytest

from svdtune.errors import SvdtuneError
from svdtune.training.collection import merge, read_extended
from svdtune.training.recipe import load_recipe

BASE = """\
model: some/model
method: {name: lora, r: 8, lora_alpha: 16}
data: {train: rows.jsonl, max_length: 256}
training: {learning_rate: 1e-4, epochs: 3}
"""


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_sections_are_changed_and_the_method_is_replaced(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", BASE)
    path = write(
        tmp_path / "in" / "mine.yaml",
        "extends: ../base.yaml\nmethod: {name: sorsa, r: 4}\ntraining: {learning_rate: 3e-5}\n",
    )
    recipe = load_recipe(path, ["--training.seed", "7"])
    assert (recipe.method.name, recipe.method.options) == ("sorsa", {"r": 4})
    assert (recipe.training.learning_rate, recipe.training.epochs, recipe.training.seed) == (3e-5, 3, 7)
    assert recipe.data.max_length == 256
    assert recipe.output.dir == "runs/mine"


@pytest.mark.parametrize("door", ["extends", "override"])
@pytest.mark.parametrize(("before", "later"), [("epochs", "max_steps"), ("max_steps", "epochs")])
def test_of_two_that_exclude_each_other_the_later_stays(tmp_path: Path, before: str, later: str, door: str) -> None:
    base = write(tmp_path / "base.yaml", BASE.replace("epochs", before))
    mine = write(tmp_path / "mine.yaml", f"extends: base.yaml\ntraining: {{{later}: 7}}\n")
    recipe = load_recipe(mine) if door == "extends" else load_recipe(base, [f"--training.{later}", "7"])
    assert (getattr(recipe.training, later), getattr(recipe.training, before)) == (7, None)
    assert recipe.training.learning_rate == 1e-4
    with pytest.raises(
        SvdtuneError, match=r"^the command line has one problem:\n  training\.epochs: excludes training\.max"
    ):
        load_recipe(base, ["--training.epochs", "2", "--training.max_steps", "7"])


def test_problems_are_those_of_the_file_or_of_the_command_line(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.yaml", BASE.replace("epochs: 3", "epochs: -3, batch_size: 0"))
    with pytest.raises(SvdtuneError) as found:
        load_recipe(
            path, ["--training.batch_size", "-1", "--method", "{name: lora, rank: 8}", "--training.max_steps", "2"]
        )
    assert [line for line in str(found.value).splitlines() if not line.startswith(" ")] == [
        "the command line has 2 problems:"
    ]
    with pytest.raises(
        SvdtuneError, match=r"(?s)^\S+mine\.yaml has one problem:\n  training\.epochs.*\nthe command line has"
    ):
        load_recipe(path, ["--training.batch_size", "-1"])


def test_later_files_change_earlier_ones(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", BASE)
    write(tmp_path / "other.yaml", "data: {train: code.jsonl}\n")
    settings = read_extended(write(tmp_path / "mine.yaml", "extends: [base.yaml, other.yaml]\n"))
    assert settings["data"] == {"train": "code.jsonl", "max_length": 256}


def test_merging_leaves_both_as_they_are() -> None:
    base, changes = {"a": {"x": 1}, "b": 1}, {"a": {"y": 2}, "b": {"z": 3}}
    assert merge(base, changes) == {"a": {"x": 1, "y": 2}, "b": {"z": 3}}
    assert (base, changes) == ({"a": {"x": 1}, "b": 1}, {"a": {"y": 2}, "b": {"z": 3}})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("extends: gone.yaml\n", r"there is no recipe .*gone\.yaml, which .*mine\.yaml extends"),
        ("extends: mine.yaml\n", r"mine\.yaml extends itself"),
        ("extends: 3\n", "extends is 3; expected a file's name"),
        ("extends: bad.yaml\n", r"bad\.yaml holds no settings"),
    ],
)
def test_what_cannot_be_extended(tmp_path: Path, text: str, message: str) -> None:
    write(tmp_path / "bad.yaml", "- a\n")
    with pytest.raises(SvdtuneError, match=message):
        read_extended(write(tmp_path / "mine.yaml", text))
