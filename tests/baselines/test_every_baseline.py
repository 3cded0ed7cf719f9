"""Every method that studies compare, by recipe: two steps on a model with grouped-query attention, then two scored items."""

import json
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from svdtune.cli import app
from svdtune.errors import SvdtuneError
from svdtune.training import check_recipe, train

QV = {"target_modules": ["q_proj", "v_proj"]}
METHODS = {
    "full": {"name": "full"},
    "prefix": {"name": "prefix_tuning", "num_virtual_tokens": 4},
    "lora": {"name": "lora", "r": 4, **QV},
    "dora": {"name": "lora", "r": 4, "use_dora": True, **QV},
    "adalora": {"name": "adalora", "init_r": 4, "target_r": 2, **QV},
    "vera": {"name": "vera", "r": 8, **QV},
    "pissa": {"name": "lora", "r": 4, "init_lora_weights": "pissa", **QV},
    "series": {"name": "bottleneck", "placement": "series", "bottleneck_size": 4},
    "parallel": {"name": "bottleneck", "placement": "parallel", "bottleneck_size": 4},
    "dylora": {"name": "dylora", "r": 4, **QV},
    "lily": {
        "name": "lily",
        "r": 4,
        "stride_A": 1,
        "num_B": 2,
        "target_modules": ["gate_proj", "up_proj", "down_proj"],
    },
    "rslora": {"name": "lora", "r": 4, "use_rslora": True, **QV},
    "randlora": {"name": "randlora", "r": 4, **QV},
    "miss": {"name": "miss", "r": 4, **QV},
    "hira": {"name": "hira", "r": 4, **QV},
    "delora": {"name": "delora", "r": 4, **QV},
    "sara": {"name": "sara", "threshold": 0.2, **QV},
    "mosara": {"name": "mosara", "threshold": 0.5, "num_heads": 2, **QV},
    "sorsa": {"name": "sorsa", "r": 4, **QV},
}


@pytest.fixture(scope="module")
def grouped(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    """A model folder with 6 heads of 8 and 3 of keys and values, as SmolLM2-135M has 9 and 3."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer),
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=3,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=tiny_tokenizer.eos_token_id,
        pad_token_id=tiny_tokenizer.pad_token_id,
        tie_word_embeddings=True,
    )
    folder = tmp_path_factory.mktemp("models") / "grouped"
    LlamaForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


def recipe(model: Path, method: dict[str, Any], folder: Path) -> dict[str, Any]:
    return {
        "model": {"name": str(model)},
        "method": method,
        "data": {
            "train": {"source": "arithmetic", "limit": 8},
            "eval": {"source": "arithmetic", "split": "test", "limit": 4},
            "prompt": "question",
            "completion": "answer",
            "answer": "answer",
            "max_length": 256,
        },
        "training": {"max_steps": 2, "batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1},
        "output": {"dir": str(folder)},
    }


@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_and_is_scored(name: str, grouped: Path, tmp_path: Path) -> None:
    settings = check_recipe(recipe(grouped, METHODS[name], tmp_path / "run"))
    result = train(settings, console=Console(file=StringIO()))
    log = [json.loads(line) for line in (tmp_path / "run" / "train_log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in log if "loss" in line]
    assert len(losses) == 2
    assert losses[1] != losses[0]
    assert result.summary["trained_parameters"] > 0
    words = ["evaluate", str(tmp_path / "run"), "--limit", "2", "--max-new-tokens", "3", "--device", "cpu"]
    shown = CliRunner().invoke(app, words)
    assert shown.exit_code == 0, shown.output
    assert "of 2 correct" in shown.stdout


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (
            {"name": "bottleneck", "bottleneck_size": "big"},
            r"method.bottleneck_size: .*expected a valid integer; got 'big'",
        ),
        ({"name": "bottleneck", "placement": "beside"}, r"`placement` must be one of 'series', 'parallel'"),
        ({"name": "bottleneck", "bottelneck_size": 4}, r"method.bottelneck_size: .*did you mean bottleneck_size"),
        ({"name": "botleneck"}, r"'botleneck' is no method; did you mean bottleneck\?"),
        ({"name": "dylora", "r": 4, "r_min": 8}, r"`r_min` must be a whole number from 1 to r = 4; got 8"),
        ({"name": "dylora", "use_dora": True}, r"`use_dora` is none of DyLoRA's settings"),
    ],
)
def test_wrong_settings_are_refused_with_the_recipe(
    method: dict[str, Any], message: str, grouped: Path, tmp_path: Path
) -> None:
    with pytest.raises(SvdtuneError, match=message):
        check_recipe(recipe(grouped, method, tmp_path))
