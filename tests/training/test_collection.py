"""Recipes and studies come with svdtune, in a checkout and in a wheel, and go by their names."""

import zipfile
from pathlib import Path

import pytest
from typer.testing import CliRunner

from svdtune.cli import app
from svdtune.errors import SvdtuneError
from svdtune.lab.study.spec import load_study
from svdtune.training import collection, load_recipe

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def recipes(*words: str) -> str:
    found = CliRunner().invoke(app, ["recipes", *words])
    assert found.exit_code == 0, found.output
    return found.stdout


def test_a_wheel_has_them_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = pytest.importorskip("hatchling.builders.wheel").WheelBuilder(str(ROOT))
    here = {kind: {*collection.shipped(kind)} for kind in ("recipe", "study")}
    with zipfile.ZipFile(next(wheel.build(directory=str(tmp_path / "dist"), versions=["standard"]))) as file:
        file.extractall(tmp_path / "installed", [name for name in file.namelist() if name.endswith(".yaml")])
    monkeypatch.setattr(collection, "PACKAGE", tmp_path / "installed" / "svdtune")
    assert {kind: {*collection.shipped(kind)} for kind in here} == here
    assert collection.find_file("small", "recipe").is_relative_to(tmp_path)
    assert load_recipe("small").output.dir == "runs/small"
    assert {*load_study("small/math")[0].tasks} == {"math"}


def test_names_are_listed_with_what_they_are() -> None:
    listed = recipes()
    assert listed == recipes("list")
    assert "\n  small " in listed
    assert "SORSA on SmolLM2-135M-Instruct, worded arithmetic" in listed
    assert "\n  sara/table-1-llama-7b " in listed
    assert not [line for line in listed.splitlines() if line.strip().startswith("_") or "/_" in line]


@pytest.mark.parametrize("name", ["small", "small-math", "sara/llama-7b-math-sara", "sorsa/llama2-7b-code-sorsa"])
def test_a_copy_is_one_file_that_means_the_same(name: str) -> None:
    told = recipes("write", name, "--output", "mine.yaml")
    assert "train it with: svdtune train mine.yaml" in told
    assert Path("mine.yaml").read_text() == recipes("show", name)
    assert Path("mine.yaml").read_text().startswith("# ")
    same = {"output": {"dir": "runs/mine"}}
    assert load_recipe("mine.yaml").model_dump() | same == load_recipe(name).model_dump() | same
    again = CliRunner().invoke(app, ["recipes", "write", name, "--output", "mine.yaml"])
    assert again.exit_code == 2
    assert "mine.yaml is there already" in again.stderr


def test_a_file_goes_before_a_name() -> None:
    Path("small").write_text("model: other\nmethod: {name: lora}\ndata: {train: x}\ntraining: {learning_rate: 1.0}\n")
    assert load_recipe("small").model.name == "other"


@pytest.mark.parametrize(
    ("given", "kind", "near"),
    [
        ("smal", "recipe", "did you mean small?"),
        ("recipes/small.yaml", "recipe", "did you mean small?"),
        ("recipe.yml", "recipe", "did you mean recipe.yaml?"),
        ("studies/small/math.yaml", "study", "did you mean small/math?"),
        ("zzzzzz", "recipe", "`svdtune recipes` lists those that come with svdtune"),
    ],
)
def test_what_comes_near_is_named(given: str, kind: collection.Kind, near: str, tmp_path: Path) -> None:
    Path("recipe.yaml").write_text("")
    with pytest.raises(SvdtuneError) as refused:
        collection.find_file(given, kind)
    assert f"{given} (looked in {tmp_path})" in str(refused.value)
    assert near in str(refused.value)


def test_plan_takes_a_name_too(monkeypatch: pytest.MonkeyPatch, tiny_folder: Path) -> None:
    words = ["plan", "small", "--model.name", str(tiny_folder), "--method.r", "2"]
    found = CliRunner().invoke(app, words)
    assert found.exit_code == 0, found.output
    assert "sorsa: " in found.stdout
