"""Every method that studies compare, by recipe: two steps on a model with grouped-query attention,
then two scored items."""

import json
import re
import shutil
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from svdtune.cli import app
from svdtune.errors import SvdtuneError
from svdtune.evaluation.generation import complete_batch
from svdtune.models import load
from svdtune.training import check_recipe, train
from svdtune.training.method import adapt
from tiny import save_tiny_llama

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
    "gralora": {"name": "gralora", "r": 4, "gralora_k": 2, **QV},
    "sara": {"name": "sara", "threshold": 0.2, **QV},
    "mosara": {"name": "mosara", "threshold": 0.5, "num_heads": 2, **QV},
    "sorsa": {"name": "sorsa", "r": 4, **QV},
}


@pytest.fixture(scope="module")
def grouped(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    """A model folder with 6 heads of 8 and 3 of keys and values, as SmolLM2-135M has 9 and 3."""
    sizes = {"hidden_size": 48, "intermediate_size": 64, "num_attention_heads": 6, "num_key_value_heads": 3}
    return save_tiny_llama(tmp_path_factory.mktemp("models") / "grouped", tiny_tokenizer, **sizes)


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
@pytest.mark.family(4)
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


def test_prefix_tuning_generates_what_it_was_trained_to_predict(grouped: Path) -> None:
    """In batches of unequal length, from a cache that starts with the prefix, as by whole forward
    passes alone."""
    model = adapt(load(grouped).model, "prefix_tuning", {"num_virtual_tokens": 4}).eval()
    prefix = model.prompt_encoder["default"].embedding.weight
    assert prefix.shape == (4, 2 * 2 * 3 * 8)  # layers, key and value, heads, width
    with torch.no_grad():
        prefix.normal_(std=3.0)
    prompts = [[5, 6, 7, 8, 9, 10], [11, 12], [20]]
    together = complete_batch(model, prompts, 5, ends=[0], pad=1)
    for prompt, completion in zip(prompts, together, strict=True):
        ids = list(prompt)
        with torch.no_grad():
            for _ in completion.tokens:
                ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        assert ids[len(prompt) :] == completion.tokens
    with model.disable_adapter():
        assert complete_batch(model, prompts, 5, ends=[0], pad=1) != together


@pytest.mark.filterwarnings("ignore:Position ids are not supported for parameter efficient tuning")
@pytest.mark.parametrize("method", ["prefix_tuning", "prompt_tuning"])
def test_a_prompt_is_given_once_and_not_at_every_token(
    method: str, grouped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapt(load(grouped).model, method, {"num_virtual_tokens": 4, "task_type": "CAUSAL_LM"}).eval()
    given: list[int] = []
    get_prompt = model.get_prompt
    monkeypatch.setattr(model, "get_prompt", lambda *a, **k: given.append(1) or get_prompt(*a, **k))
    complete_batch(model, [[5, 6, 7], [8]], 5, ends=[0], pad=1)
    assert len(given) == 1


@pytest.mark.parametrize("name", ["dylora", "series", "adalora", "prefix"])
@pytest.mark.family(1)
def test_a_stopped_run_goes_on_as_if_it_had_not(name: str, grouped: Path, tmp_path: Path) -> None:
    """Also where every step draws a rank."""
    quiet = Console(file=StringIO())
    settings = recipe(grouped, METHODS[name], tmp_path / "whole")
    settings["training"] |= {"max_steps": 4, "save_steps": 2, "keep_checkpoints": 2}
    whole = train(check_recipe(settings), console=quiet)
    stopped = tmp_path / "stopped"
    left_out = shutil.ignore_patterns("checkpoint-4", "adapter", "training.json")
    shutil.copytree(tmp_path / "whole", stopped, ignore=left_out)
    again = train(check_recipe(settings | {"output": {"dir": str(stopped)}}), resume=True, console=quiet)
    assert again.summary["resumed_from"] == "checkpoint-2"
    one, other = (load_file(result.adapter / "adapter_model.safetensors") for result in (whole, again))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("series", r"a bottleneck adapter cannot be merged"),
        ("prefix", r"changes no weight and cannot be merged"),
        ("dylora", None),
    ],
)
def test_merging_a_run(name: str, message: str | None, grouped: Path, tmp_path: Path) -> None:
    train(check_recipe(recipe(grouped, METHODS[name], tmp_path / "run")), console=Console(file=StringIO()))
    words = ["merge", str(tmp_path / "run"), "--output", str(tmp_path / "merged"), "--device", "cpu"]
    shown = CliRunner().invoke(app, words)
    if message is None:
        assert shown.exit_code == 0, shown.output
        assert "4 weights changed" in shown.stdout
    else:
        assert shown.exit_code == 2
        assert re.search(message, shown.stderr)
        assert not (tmp_path / "merged").exists()


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
