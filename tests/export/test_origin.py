"""A base's revision, and whether its code may run, go with its name through every door; a base of
the hub stays at the commit that was trained on."""

import ast
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from transformers import AutoModelForCausalLM

from runs import go
from svdtune.analysis.weights import open_run
from svdtune.export.source import Source, base_folder, find_source, open_source
from svdtune.methods.files.adapter import read_settings
from svdtune.models.loading import load
from svdtune.system import read_json
from svdtune.training.recipe import check_recipe

ROOT = Path(__file__).parents[2] / "svdtune"
# What opens a part of a model by its name, beside the methods of Transformers' classes.
OPENING = {"snapshot_download", "hf_hub_download", "LLM"}
CLASSES = ("AutoModel", "AutoTokenizer", "AutoConfig", "GenerationConfig")
# The doors, and the files that read a .gguf of this disk or what was just written.
DOORS = {"models/loading.py", "models/smollm2.py", "checkpoint/model.py", "checkpoint/gguf.py", "export/source.py",
         "evaluation/vllm.py", "export/split.py"}  # fmt: skip
CARRYING = {"load", "load_tokenizer", "load_config", "load_decoding", "open_checkpoint"}
# Where a name comes alone, from a command line or a study, or is a folder of this disk.
ALONE = {"training/draft.py", "analysis/base.py", "lab/study/counting.py", "lab/study/runner.py", "registry.py",
         "methods/registration.py"}  # fmt: skip
OLD, NEW = "0" * 39 + "1", "0" * 39 + "2"


def calls() -> Iterator[tuple[str, str, ast.Call]]:
    """(file, what is called, the call) of the whole package."""
    for path in sorted(ROOT.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call):
                yield str(path.relative_to(ROOT)), ast.unparse(node.func), node


def test_models_are_opened_by_the_doors_alone() -> None:
    opening = {
        file
        for file, called, _ in calls()
        if called.rpartition(".")[2] in OPENING or (called.endswith(".from_pretrained") and called.startswith(CLASSES))
    }
    assert opening <= DOORS
    assert {"models/loading.py", "checkpoint/model.py", "export/source.py", "evaluation/vllm.py"} <= opening


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
