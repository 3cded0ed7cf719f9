"""`svdtune export`: a LoRA folder, and the two adapters compared where a base is named."""

import re
from pathlib import Path

from peft import PeftConfig, get_peft_model
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from svdtune import MoSaraConfig, SaraConfig, SorsaConfig, cli


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
    assert "has no adapter, so there is nothing to export" in result.stderr


class TestCombine:
    def combine(self, *words):
        return CliRunner().invoke(cli.app, ["combine", *map(str, words)])

    def test_a_weighted_sum_of_two_methods(self, tiny_folder, tmp_path):
        first = adapter_in(tmp_path / "first", tiny_folder, SorsaConfig(r=4))
        second = adapter_in(tmp_path / "second", tiny_folder, SaraConfig(r=3))
        result = self.combine(f"{first}=0.7", second, "--output", tmp_path / "sum")
        assert result.exit_code == 0, result.output
        assert "LoRA of rank 8 to 11 in 14 layers" in result.stdout
        result = self.combine(first, f"{second}=-0.5", "--output", tmp_path / "cut", "--rank", 5)
        assert result.exit_code == 0, result.output
        assert "rank 5 in 14 layers" in result.stdout
        assert "relative error" in result.stdout
        cut, exact = (PeftConfig.from_pretrained(tmp_path / name) for name in ("cut", "sum"))
        assert (cut.r, exact.r) == (5, 11)

    def test_what_cannot_be_combined_is_one_message(self, tiny_folder, tmp_path):
        first = adapter_in(tmp_path / "first", tiny_folder, SaraConfig(r=3))
        for words, message in [
            ([f"{first}=much"], "expected ADAPTER=WEIGHT with a number"),
            ([first, f"{first}=2"], "is named twice"),
            ([tiny_folder], "has no adapter, so there is nothing to combine"),
            ([tmp_path / "nothing=1"], f"there is no run or adapter folder {tmp_path / 'nothing'}"),
        ]:
            result = self.combine(*words, "--output", tmp_path / "sum")
            assert result.exit_code == 2
            assert message in result.stderr
        assert not (tmp_path / "sum").exists()


def test_a_compact_adapter_is_exported_with_its_base(tiny_folder, tmp_path):
    for name, compact in (("compact", True), ("whole", False)):
        adapter = adapter_in(tmp_path / name, tiny_folder, SorsaConfig(r=4, compact=compact, task_type="CAUSAL_LM"))
        given = ["export", str(adapter), "--output", str(tmp_path / f"{name}-lora"), "--base", str(tiny_folder)]
        result = CliRunner().invoke(cli.app, given)
        assert result.exit_code == 0, result.output
        difference, effect = map(float, re.findall(r"(?:difference|by) (\d\S+e[-+]\d+)", result.stdout))
        assert difference < 1e-4 * effect
