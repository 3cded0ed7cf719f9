"""Whatever is wrong with an adapter's folder, every verb answers with one message, and writes
nothing."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from svdtune import SorsaConfig
from svdtune.cli import app

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def config(**changes):
    def damage(folder: Path) -> None:
        found = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(found | changes))

    return damage


def text(content: str):
    return lambda folder: (folder / CONFIG).write_text(content)


def tensors(change):
    def damage(folder: Path) -> None:
        found = load_file(folder / WEIGHTS)
        change(found)
        save_file(found, folder / WEIGHTS)
        config(weights_sha256=None)(folder)

    return damage


def data(change):
    return lambda folder: (folder / WEIGHTS).write_bytes(change(bytearray((folder / WEIGHTS).read_bytes())))


DAMAGES = {
    "cut": (data(lambda whole: whole[: len(whole) // 2]), "damaged"),
    "altered": (data(lambda whole: whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:]), "is not the file that was saved"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), "has no adapter_model.safetensors"),
    "no tensors": (tensors(dict.clear), "layer 'model.layers.0"),
    "a tensor less": (tensors(dict.popitem), "lacks"),
    "a tensor more": (tensors(lambda found: found.update({"base_model.model.x.sorsa_U": torch.ones(2)})), "x"),
    "newer": (config(entangled=True, svdtune_version="9.9"), "it was saved by svdtune 9.9. Upgrade svdtune"),
    "another type": (config(peft_type="QUANTUM"), "an adapter of type QUANTUM"),
    "a list for a type": (config(peft_type=["SORSA"]), "an adapter of type ['SORSA']"),
    "a task that is none": (config(task_type="DREAMING"), "Invalid task type: 'DREAMING'"),
    "a giant number": (config(r=None, threshold=10**400), "`threshold` must lie in (0, 1]"),
    "too deep": (text("[" * 100_000), "adapter_config.json is damaged"),
    "no type": (config(peft_type=None), "an adapter of type None"),
    "a word for a number": (config(r="four"), "`r` must be a whole number of at least 1; got 'four'"),
    "a list for a dict": (config(ranks=[1, 2]), "`ranks` must be a dict by module name; got [1, 2]"),
    "no JSON": (text("{"), "adapter_config.json is damaged"),
    "no object": (text("[]"), "expected a JSON object, found a list"),
}


@pytest.fixture(scope="module")
def adapter(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters") / "whole"
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    get_peft_model(model, SorsaConfig(r=2, task_type="CAUSAL_LM")).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("verb", ["merge", "export", "generate"])
@pytest.mark.parametrize("name", DAMAGES)
def test_one_message(name: str, verb: str, adapter: Path, tmp_path: Path) -> None:
    folder, output = tmp_path / "adapter", tmp_path / "out" / "result"
    shutil.copytree(adapter, folder)
    damage, message = DAMAGES[name]
    damage(folder)
    words = ["generate", folder, "Hi"] if verb == "generate" else [verb, folder, "--output", output]
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 2, result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("svdtune: ")]
    assert len(lines) == 1
    assert message in lines[0]
    assert not output.parent.exists() or not list(output.parent.iterdir())
