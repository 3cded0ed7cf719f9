"""`svdtune init` end to end on a tiny model."""

import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from svdtune import SaraConfig
from svdtune.cli import app
from svdtune.methods.files.adapter import read_adapter


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_an_adapter_is_written_and_loads(tiny_folder, tmp_path):
    output = tmp_path / "adapter"
    result = run("init", tiny_folder, "--r", "3", "--target-modules", "q_proj,up_proj", "--output", output)
    assert result.exit_code == 0, result.output
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_folder), output, is_trainable=True)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert f"4 layers, {trained:,} trained" in result.output


def test_a_plan_can_be_started(tiny_folder, tmp_path):
    plan = tmp_path / "plan.json"
    assert run("plan", tiny_folder, "--budget", "3%", "--method", "sara", "--json", plan).exit_code == 0
    for name in ("one", "two"):
        result = run("init", tiny_folder, "--plan", plan, "--output", tmp_path / name)
        assert result.exit_code == 0, result.output
    one, two = read_adapter(tmp_path / "one"), read_adapter(tmp_path / "two")
    planned = {layer["name"]: layer["rank"] for layer in json.loads(plan.read_text())["layers"]}
    assert one.config.ranks == planned
    for name, tensors in one.layers.items():
        assert all(torch.equal(tensor, two.layers[name][part]) for part, tensor in tensors.items())


def test_a_recipes_adapter_can_be_started(tiny_folder, tmp_path):
    recipe = {
        "model": str(tiny_folder),
        "method": {"name": "sara", "threshold": 0.3, "init": "spectral", "target_modules": ["q_proj"]},
        "data": {"train": "rows.jsonl"},
        "training": {"learning_rate": 1e-3},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    words = ["--method.use_lambda", "false", "--output", tmp_path / "adapter"]
    result = run("init", tmp_path / "recipe.yaml", *words)
    assert result.exit_code == 0, result.output
    config = read_adapter(tmp_path / "adapter").config
    assert (config.init, config.use_lambda, config.threshold) == ("spectral", False, 0.3)
    own = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_folder), SaraConfig(threshold=0.3, target_modules=["q_proj"])
    )
    assert config.ranks == own.peft_config["default"].ranks


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "lora", "--r", "2"], "init_lora_weights='pissa', 'olora' or 'mica'; got True"),
        (["--r", "0"], "must be a whole number"),
        (["--r", "2", "--threshold", "0.5"], "both set the ranks"),
        (["--plan", "nowhere.json"], "nowhere.json is no plan"),
        (["--r", "2", "--target-modules", "nothing"], "nothing"),
    ],
)
def test_user_errors_are_one_line(tiny_folder, tmp_path, options, message):
    result = run("init", tiny_folder, "--output", tmp_path / "adapter", *options)
    assert result.exit_code == 2
    assert message in result.output
    assert "Traceback" not in result.output
    assert not (tmp_path / "adapter").exists()
