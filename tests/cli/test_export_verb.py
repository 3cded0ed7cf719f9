"""`svdtune export`: a LoRA folder, and the two adapters compared where a base is named."""

import re
from pathlib import Path

from peft import PeftConfig, get_peft_model
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from svdtune import MoSaraConfig, SorsaConfig, cli


def adapter_in(folder: Path, base: Path, config) -> Path:
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    for name, parameter in model.named_parameters():
        if name.endswith("sorsa_s.default"):
            parameter.data *= 1.5
    model.save_pretrained(folder)
    return folder


def test_export_and_compare(tiny_folder, tmp_path):
    adapter = adapter_in(tmp_path / "adapter", tiny_folder, SorsaConfig(r=4))
    given = ["export", str(adapter), "--to", "lora", "--output", str(tmp_path / "lora"), "--base", str(tiny_folder)]
    result = CliRunner().invoke(cli.app, given)
    assert result.exit_code == 0, result.output
    assert "LoRA of rank 8 in 14 layers" in result.stdout
    assert "no loss" in result.stdout
    difference, effect = map(float, re.findall(r"(?:difference|by) (\d\S+e[-+]\d+)", result.stdout))
    assert difference < 1e-4 * effect
    assert PeftConfig.from_pretrained(tmp_path / "lora").peft_type == "LORA"


def test_a_cut_rank_lists_every_layers_error(tiny_folder, tmp_path):
    adapter = adapter_in(tmp_path / "adapter", tiny_folder, SorsaConfig(r=4))
    given = ["export", str(adapter), "--output", str(tmp_path / "lora"), "--rank", "2"]
    result = CliRunner().invoke(cli.app, given)
    assert result.exit_code == 0, result.output
    assert len(re.findall(r"\S+_proj: relative error \d", result.stdout)) == 14
    assert "no loss" not in result.stdout


def test_what_cannot_be_exported_is_one_message(tiny_folder, tmp_path):
    adapter = adapter_in(tmp_path / "adapter", tiny_folder, MoSaraConfig(r=4, num_heads=2))
    result = CliRunner().invoke(cli.app, ["export", str(adapter), "--output", str(tmp_path / "lora")])
    assert result.exit_code == 2
    assert "Mo-SARA with 2 heads" in result.stderr
    result = CliRunner().invoke(cli.app, ["export", str(tiny_folder), "--output", str(tmp_path / "lora")])
    assert result.exit_code == 2
    assert "has no adapter to export" in result.stderr
