"""`svdtune plan` and `svdtune cache` end to end on a tiny model."""

import json

import pytest
import torch
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from svdtune.cli import app
from svdtune.methods import SaraConfig
from svdtune.training.recipe import Method


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=64,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_plan_writes_what_train_and_a_stock_lora_take(folder, tmp_path):
    result = run(
        "plan", folder, "--budget", "5%", "--json", tmp_path / "p" / "plan.json", "--chart", tmp_path / "k.svg"
    )
    assert result.exit_code == 0, result.output
    assert "q_proj" in result.output
    plan = json.loads((tmp_path / "p" / "plan.json").read_text())
    assert plan["share"] <= 0.05
    assert f"{plan['trained_parameters']:,}" in result.output
    assert SaraConfig(**Method(**plan["method"]).options).rank_pattern == plan["method"]["rank_pattern"]
    assert LoraConfig(**plan["lora"]).rank_pattern == plan["method"]["rank_pattern"]
    assert plan["memory"]["total"] == sum(size for name, size in plan["memory"].items() if name != "total")
    assert (tmp_path / "k.svg").read_text().startswith("<?xml")


@pytest.mark.parametrize(
    ("options", "trained"),
    [
        (["--method", "lora", "--r", "2"], 2 * 2 * 2 * 64),
        (["--method", "sorsa", "--r", "2", "--target-modules", "q_proj"], 2 * 2 * 65),
        (
            ["--method", "sara", "--r", "2", "--target-modules", "q_proj,o_proj", "--exclude-modules", ".*1.*"],
            2 * 2 * 65,
        ),
        (["--method", "mosara", "--r", "3", "--num-heads", "4"], 4 * (4 * 3 + 32 + 3 + 4)),
    ],
)
def test_counts_of_every_method(folder, options, trained):
    result = run("plan", folder, *options)
    assert result.exit_code == 0, result.output
    assert f": {trained:,} trained parameters" in result.output


def test_sara_has_the_papers_threshold_by_default(folder):
    assert "threshold 0.01" in run("plan", folder).output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--threshold", "0.1", "--r", "2"], "exactly one of"),
        (["--budget", "lots"], "neither a share"),
        (["--method", "sorsa"], "exactly one of"),
        (["--r", "2", "--dtype", "int3"], "int3"),
        (["--r", "2", "--batch-size", "0"], "at least 1"),
    ],
)
def test_user_errors_are_one_line(folder, options, message):
    result = run("plan", folder, *options)
    assert result.exit_code == 2
    assert message in result.output
    assert "Traceback" not in result.output


def test_cache_lists_and_clears(folder, monkeypatch):
    assert "empty" in run("cache", "clear", "--yes").output
    run("plan", folder, "--threshold", "0.1", "--target-modules", "q_proj")
    assert "2 files" in run("cache", "list").output
    assert "removed 2 files" in run("cache", "clear", "--yes").output
    assert "0 files" in run("cache", "list").output
    monkeypatch.setenv("SVDTUNE_CACHE", "off")
    assert "off" in run("cache", "list").output
