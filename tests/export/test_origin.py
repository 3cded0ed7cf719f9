"""A base's revision, and whether its code may run, go with its name through every door; a base of
the hub stays at the commit that was trained on."""

import ast
import functools
import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
import transformers.dynamic_module_utils
import transformers.utils.hub
from peft import get_peft_model
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from runs import go
from svdtune import SaraConfig
from svdtune.analysis.weights import open_run
from svdtune.cli import app
from svdtune.export.source import Source, base_folder, find_source, open_source
from svdtune.methods.files.adapter import read_settings
from svdtune.models.loader import load
from svdtune.system import read_json
from svdtune.training.recipe import check_recipe, load_recipe
from tiny import tiny_llama

ROOT = Path(__file__).parents[2] / "svdtune"
# What opens a part of a model by its name, beside the methods of Transformers' classes.
OPENING = {"snapshot_download", "hf_hub_download", "LLM"}
CLASSES = ("AutoModel", "AutoTokenizer", "AutoConfig", "GenerationConfig")
# The doors, and the files that read a .gguf of this disk or what was just written.
DOORS = {"models/loader.py", "models/smollm2.py", "checkpoint/model.py", "checkpoint/gguf.py", "export/source.py",
         "evaluation/vllm.py", "export/split.py"}  # fmt: skip
CARRYING = {"load", "load_tokenizer", "load_config", "load_decoding", "open_checkpoint"}
# Where what is loaded is no model.
ALONE = {"registry.py", "methods/registration.py"}
OLD, NEW = "0" * 39 + "1", "0" * 39 + "2"


@functools.cache
def calls() -> list[tuple[str, str, ast.Call]]:
    """(file, what is called, the call) of the whole package."""
    return [
        (str(path.relative_to(ROOT)), ast.unparse(node.func), node)
        for path in sorted(ROOT.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Call)
    ]


def test_models_are_opened_by_the_doors_alone() -> None:
    opening = {
        file
        for file, called, _ in calls()
        if called.rpartition(".")[2] in OPENING or (called.endswith(".from_pretrained") and called.startswith(CLASSES))
    }
    assert opening <= DOORS
    assert {"models/loader.py", "checkpoint/model.py", "export/source.py", "evaluation/vllm.py"} <= opening


def test_who_calls_a_door_says_the_origin() -> None:
    silent = {
        f"{file}:{call.lineno}"
        for file, called, call in calls()
        if called in CARRYING
        and file not in ALONE
        and not {keyword.arg for keyword in call.keywords} & {None, "revision", "trust_remote_code"}
    }
    assert silent == set()


def recipe_of(model: str, folder: Path) -> Any:
    return check_recipe({
        "model": {"name": model, "trust_remote_code": True},
        "method": {"name": "sorsa", "r": 2, "target_modules": ["q_proj"]},
        "data": {"train": {"source": "arithmetic", "limit": 4}, "prompt": "question", "completion": "solution",
                 "max_length": 256},
        "training": {"max_steps": 1, "batch_size": 2, "learning_rate": 1e-3, "save_steps": None},
        "output": {"dir": str(folder / "run")},
    })  # fmt: skip


@pytest.fixture
def hub(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache with two commits of one model; `main` is the old one."""
    cache = tmp_path / "hub"
    model = cache / "models--some--model"
    for commit in (OLD, NEW):
        shutil.copytree(tiny_folder, model / "snapshots" / commit)
    changed = AutoModelForCausalLM.from_pretrained(tiny_folder)
    with torch.no_grad():
        changed.model.layers[0].self_attn.q_proj.weight.mul_(2)
    changed.save_pretrained(model / "snapshots" / NEW)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(OLD)
    for name, value in (("HF_HUB_CACHE", str(cache)), ("HF_HUB_OFFLINE", True)):
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    if hasattr(transformers.utils.hub, "TRANSFORMERS_CACHE"):  # Transformers 4 has a name of its own
        monkeypatch.setattr(transformers.utils.hub, "TRANSFORMERS_CACHE", str(cache))
    return model


# PEFT asks the hub whether the vocabulary was resized
@pytest.mark.filterwarnings("ignore:Unable to fetch remote file", "ignore:Could not find a config file")
def test_a_run_stays_at_the_commit_that_it_was_trained_on(hub: Path, tmp_path: Path) -> None:
    folder, _ = go(recipe_of("some/model", tmp_path))
    assert read_json(folder / "training.json")["commit"] == OLD
    assert read_settings(folder / "adapter")["revision"] == OLD
    assert f"| base at commit | `{OLD}` |" in (folder / "adapter" / "README.md").read_text()
    (hub / "refs" / "main").write_text(NEW)
    assert load("some/model").commit == NEW
    for given in (folder, folder / "adapter"):
        source = find_source(given)
        assert source.origin == {"revision": OLD, "trust_remote_code": given == folder}
        assert open_source(source).commit == OLD
        assert base_folder(source).name == OLD
    opened = open_run(folder)
    (layer,) = opened.layers[:1]
    assert torch.equal(opened.start(layer), opened._checkpoint.weight(layer.name))


def test_another_base_has_another_revision(tiny_folder: Path, tmp_path: Path) -> None:
    recipe = recipe_of("some/model", tmp_path)
    recipe.model.revision = "v1"
    assert Source("some/model", recipe=recipe).origin == {"revision": "v1", "trust_remote_code": True}
    assert Source(str(tiny_folder), recipe=recipe).origin == {"revision": None, "trust_remote_code": True}


OWN = """\
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""
LAYERS = ["--target-modules", "q_proj"]
ORIGIN = ["--revision", NEW, "--trust-remote-code"]
STUDY = {"title": "One", "tasks": {"one": "recipe.yaml"}, "budgets": ["1%"], "seeds": [1],
         "arms": {"sara": {"method": {"name": "sara", "r": 2, "target_modules": ["q_proj"]}}}}  # fmt: skip


@pytest.fixture
def own(hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model of the hub has code of its own, and no `main`; two recipes, a study and rows."""
    (hub / "refs" / "main").unlink()
    folder = hub / "snapshots" / NEW
    auto = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    (folder / "config.json").write_text(
        json.dumps(read_json(folder / "config.json") | {"model_type": "own", "auto_map": auto})
    )
    (folder / "own.py").write_text(OWN)
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"{n} + 2", "completion": str(n + 2)} for n in range(10)]
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = recipe_of("some/model", tmp_path).model_dump(mode="json", exclude_unset=True)
    settings["evaluation"] = {"data": {"source": "arithmetic", "limit": 2}}
    for name, origin in (("recipe", {"revision": NEW, "trust_remote_code": True}), ("bare", {})):
        model = {"name": "some/model", **origin}
        Path(f"{name}.yaml").write_text(json.dumps(settings | {"model": model}))
    Path("study.yaml").write_text(json.dumps(STUDY))
    change = {"settings": {"model": {"revision": NEW, "trust_remote_code": True}}}
    Path("changed.yaml").write_text(json.dumps(STUDY | {"tasks": {"one": "bare.yaml"}} | change))


@pytest.mark.parametrize("words", [
    ["new", "some/model", "rows.jsonl", "--overwrite", *ORIGIN],
    ["plan", "some/model", "--threshold", "0.1", *LAYERS, *ORIGIN],
    ["plan", "bare.yaml", *ORIGIN],
    ["init", "some/model", "--r", "2", "--output", "made", *LAYERS, *ORIGIN],
    ["init", "some/model", "--method", "lora", "--method.init_lora_weights", "mica", "--r", "2", "--output", "made",
     *LAYERS, *ORIGIN],
    ["analyze", "some/model", "--modules", "q_proj", *ORIGIN],
    ["study", "new", "some/model", "rows.jsonl", "--methods", "sara", "--overwrite",
     *ORIGIN],
    ["study", "study.yaml", "--dry-run"],
    ["study", "changed.yaml", "--dry-run"],
], ids=lambda words: f"{words[0]}-{words[1]}".replace("/", "-").replace(".", "-"))  # fmt: skip
def test_verbs_take_the_origin_of_a_model(words: list[str], own: None) -> None:
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    if words[0] == "init":
        assert read_json(Path("made/adapter_config.json"))["revision"] == NEW
        assert find_source("made").origin["revision"] == NEW
    if "new" in words:
        written = load_recipe("study-recipe.yaml" if words[0] == "study" else "recipe.yaml")
        assert written.model.origin == {"revision": NEW, "trust_remote_code": True}


@pytest.mark.parametrize("left", [ORIGIN[:2], ORIGIN[2:]], ids=["code", "revision"])
def test_without_its_origin_the_model_is_not_opened(left: list[str], own: None) -> None:
    assert CliRunner().invoke(app, ["plan", "some/model", *LAYERS, *left]).exit_code == 2


def test_an_adapter_remembers_the_commit_that_its_model_says(tmp_path: Path) -> None:
    model = tiny_llama()
    model.config._commit_hash = OLD
    made = get_peft_model(model, SaraConfig(r=1, target_modules=["q_proj"]))
    made.save_pretrained(tmp_path)
    assert read_settings(tmp_path)["revision"] == OLD
