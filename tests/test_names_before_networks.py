"""What a user types for something that is not there is answered at once, with what comes near; a
run works from anywhere."""

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from typer.testing import CliRunner

from runs import go
from svdtune.cli import app
from svdtune.errors import SvdtuneError
from svdtune.names import check_hub_name, meant
from svdtune.training import train
from svdtune.training.folder import read_run
from svdtune.training.recipe import check_recipe


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("runs/small", "my-model", "org"):
        Path(folder).mkdir(parents=True)
    Path("rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 2)

    def asked(*_: Any, **__: Any) -> None:
        raise AssertionError("the network was asked")

    for name in ("snapshot_download", "hf_hub_download"):
        monkeypatch.setattr(huggingface_hub, name, asked)


NEW = ["--output", "new"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["evaluate", "runs/smal"], "there is no model runs/smal"),
        (["generate", "runs/smal", "hi"], "did you mean runs/small? "),
        (["plan", "my-modle"], "did you mean my-model? "),
        (["new", "smollm2-135M", "rows.jsonl"], "did you mean smollm2-135m? "),
        (["generate", "org/other", "hi"], "fetch it first: hf download org/other"),
        (["generate", "a b", "hi"], "It is no name on the hub either; expected a Transformers folder"),
        (["generate", "./nowhere", "hi"], "expected a Transformers folder or a .gguf file (looked in "),
        (["merge", "runs/smal", *NEW], "nothing to merge (looked in "),
        (["export", "runs/smal", *NEW], "did you mean runs/small?"),
        (["init", "my-modle", *NEW], "did you mean my-model? "),
        (["report", "runs/smal"], "there is no run runs/smal (looked in "),
        (["analyze", "runs/smal"], "did you mean runs/small? "),
        (["data", "check", "row.jsonl"], "did you mean rows.jsonl?"),
        (["evaluate", "MODEL", "--data", "row.jsonl"], "there is no file row.jsonl (looked in "),
        (["evaluate", "MODEL", "--data", "rowsjsonl"], "did you mean rows.jsonl? Expected a file, a generator"),
        (["evaluate", "MODEL", "--data", "arithmetics"], "did you mean arithmetic? "),
        (["train", "recipe.yaml"], "there is no recipe recipe.yaml (looked in "),
    ],
    ids=lambda part: "-".join(part[:3]) if isinstance(part, list) else "",
)
def test_a_name_is_answered_before_a_network_is_asked(
    words: list[str], says: str, tiny_folder: Path, tmp_path: Path
) -> None:
    result = CliRunner().invoke(app, [str(tiny_folder) if word == "MODEL" else word for word in words])
    assert (result.exit_code, result.exception.__class__) in ((2, SystemExit), (2, type(None))), result.output
    said = result.output
    assert says in said
    assert f"looked in {tmp_path}" in said


def test_what_may_be_on_the_hub_is_left_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("gpt2", "meta-llama/Llama-2-7b-hf", "huggyllama/llama-7b"):
        check_hub_name(name, "model", "a model")
    with pytest.raises(SvdtuneError):
        check_hub_name("org/model", "model", "a model")
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, **__: "/cache/config.json")
    check_hub_name("org/model", "model", "a model")


def test_only_what_would_do_comes_near() -> None:
    assert "did you mean" not in meant("rows.json1", folders=True)
    assert meant("rows.json1").endswith("did you mean rows.jsonl?")


def test_a_run_of_relative_paths_is_used_from_anywhere(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("base").symlink_to(tiny_folder)
    Path("arithmetic").mkdir()  # and a generator of that name goes before it
    recipe: dict[str, Any] = {
        "model": "base",
        "method": {"name": "lora", "r": 2, "target_modules": ["q_proj"]},
        "data": {"train": ["rows.jsonl", {"source": "arithmetic", "limit": 2}], "max_length": 256},
        "training": {"max_steps": 1, "batch_size": 2, "learning_rate": 1e-3},
        "evaluation": {"data": "held-out.jsonl", "task": "exact", "max_new_tokens": 2},
        "output": {"dir": "runs/here"},
    }
    Path("held-out.jsonl").write_text('{"prompt": "x", "completion": "y"}\n')
    recipe["data"]["train"] = recipe["data"]["train"][0]
    folder, shown = go(recipe)
    assert "data      rows.jsonl: 2 examples" in shown, "what is printed is what was typed"
    kept = read_run(folder)
    assert (kept.model.name, kept.data.train[0].source) == (str(tmp_path / "base"), str(tmp_path / "rows.jsonl"))
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "base")
    assert "| data | `rows.jsonl`, 2 rows |" in (folder / "adapter" / "README.md").read_text()
    with pytest.raises(SvdtuneError, match="holds a finished run"):
        train(check_recipe(recipe))
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    for given in ("../runs/here", "../runs/here/adapter"):
        found = CliRunner().invoke(app, ["generate", given, "hi", "--max-new-tokens", "1"])
        assert found.exit_code == 0, found.output
    found = CliRunner().invoke(app, ["evaluate", "../runs/here"])
    assert found.exit_code == 0, found.output
    assert "of 1 correct" in found.stdout


def test_a_generator_goes_before_a_folder_of_its_name(tiny_folder: Path) -> None:
    from svdtune.training.folder import from_anywhere

    Path("arithmetic").mkdir()
    settings: dict[str, Any] = {
        "model": str(tiny_folder),
        "method": {"name": "lora"},
        "training": {"learning_rate": 1.0},
    }
    recipe = check_recipe(settings | {"data": {"train": "arithmetic"}, "output": {"dir": "x"}})
    assert from_anywhere(recipe) == recipe
