"""Samples of the weights' movement: what they say for each method, at which steps, and what is
refused."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM

from svdtune import MoSaraConfig, SaraConfig, SorsaConfig
from svdtune.errors import SvdtuneError
from svdtune.linalg.deviation import compared_factors, deviation
from svdtune.methods.layers.matrices import observed_layers
from svdtune.system import read_objects
from svdtune.training import check_recipe, train
from svdtune.training.movement import SampleMovement, movement, sampled_steps, side_by_side, start_of
from tiny import tiny_llama

TARGETS = ["q_proj", "v_proj"]
CONFIGS = {
    "full": None,
    "sara": SaraConfig(threshold=0.3, target_modules=TARGETS),
    "mosara": MoSaraConfig(threshold=0.3, num_heads=1, target_modules=TARGETS),
    "sorsa": SorsaConfig(r=3, target_modules=TARGETS),
    "lora": LoraConfig(r=3, target_modules=TARGETS),
    "pissa": LoraConfig(r=3, init_lora_weights="pissa", target_modules=TARGETS),
    "dora": LoraConfig(r=3, use_dora=True, target_modules=TARGETS),
}


def tiny() -> LlamaForCausalLM:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
    return tiny_llama(vocab_size=32, **sizes).train()


@pytest.mark.parametrize("method", CONFIGS)
def test_a_sample_of_every_method(method: str, tmp_path: Path) -> None:
    model = tiny()
    config = CONFIGS[method]
    first = {name: p.detach().clone() for name, p in model.named_parameters()}
    model = model if config is None else get_peft_model(model, config)
    sampler = SampleMovement(model, tmp_path, modules=TARGETS)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)
    (tmp_path / "analysis").mkdir()
    sampler.sample(7)
    (sample,) = read_objects(sampler.path)
    assert sample["step"] == 7
    assert len(sample["layers"]) == 4
    for layer in sampler.layers:
        found, before, now = sample["layers"][layer.name], first[f"{layer.name}.weight"], layer.weight()
        expected = deviation(compared_factors(before), compared_factors(now))
        assert found["delta_sigma"] == pytest.approx(expected.delta_sigma, rel=1e-3)
        assert found["delta_d"] == pytest.approx(expected.delta_d, rel=1e-2)
        assert found["angle"] == pytest.approx(expected.angle, rel=1e-2)
        assert found["relative_change"] == pytest.approx(float((now - before).norm() / before.norm()), rel=1e-3)
        assert (found["condition"] is None) == (method in ("full", "dora"))
        assert set(found["orthonormality"]) == ({"U", "V"} if method == "sorsa" else set())
    if method == "sorsa":
        singular = torch.linalg.svdvals(
            torch.mm(*(lambda A, B: (B.double(), A.double().mT))(*sampler.layers[0].trained_pair()))
        )
        assert sample["layers"][sampler.layers[0].name]["condition"] == pytest.approx(float(singular[0] / singular[2]))


def test_layers_side_by_side_give_what_they_give_one_by_one(tmp_path: Path) -> None:
    model = get_peft_model(tiny(), SorsaConfig(r=3, target_modules="all-linear"))
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(side_by_side(lambda layer: movement(layer, start_of(layer)), observed_layers(model)))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1]
    assert list(found[0]) == [layer.name for layer in observed_layers(model)]


def test_steps_are_spread_evenly_and_have_both_ends() -> None:
    assert sampled_steps(5, 100) == {0, 25, 50, 75, 100}
    assert sampled_steps(20, 3) == {0, 1, 2, 3}
    assert sampled_steps(2, 7) == {0, 7}


def test_samples_that_would_take_too_long_are_left_out_but_never_the_last(tmp_path: Path) -> None:
    model = get_peft_model(tiny(), SorsaConfig(r=3, target_modules=TARGETS))
    sampler = SampleMovement(model, tmp_path, samples=11, max_share=0.5)
    state = SimpleNamespace(global_step=0, max_steps=10, is_world_process_zero=True)
    sampler.on_train_begin(None, state, None)
    sampler.spent = 1e6  # as if the first had taken days
    for step in range(1, 11):
        state.global_step = step
        sampler.on_step_end(None, state, None)
    assert [sample["step"] for sample in read_objects(sampler.path)] == [0, 10]


def test_a_half_written_line_does_not_count(tmp_path: Path) -> None:
    (tmp_path / "during.jsonl").write_text('{"step": 0, "layers": {}}\n{"step": 5, "lay')
    assert [sample["step"] for sample in read_objects(tmp_path / "during.jsonl")] == [0]
    assert read_objects(tmp_path / "nothing.jsonl") == []


@pytest.mark.parametrize("modules", [["o_proj"], ["*.nothing"]])
def test_patterns_that_match_nothing_are_refused(modules: list[str], tmp_path: Path) -> None:
    model = get_peft_model(tiny(), SorsaConfig(r=3, target_modules=TARGETS))
    with pytest.raises(SvdtuneError, match="matches no layer whose change is a matrix; there are q_proj, v_proj"):
        SampleMovement(model, tmp_path, modules=modules)


def test_several_heads_are_refused(tmp_path: Path) -> None:
    model = get_peft_model(tiny(), MoSaraConfig(threshold=0.3, num_heads=2, target_modules=TARGETS))
    with pytest.raises(SvdtuneError, match="Mo-SARA with several heads has none: leave the section out"):
        SampleMovement(model, tmp_path)


@pytest.fixture
def settings(tiny_folder: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "model": str(tiny_folder),
        "method": {"name": "sorsa", "r": 4, "target_modules": TARGETS},
        "data": {
            "train": {"source": "arithmetic", "limit": 8},
            "prompt": "question",
            "completion": "solution",
            "max_length": 256,
        },
        "training": {"max_steps": 4, "batch_size": 2, "learning_rate": 1e-2, "logging_steps": 1},
        "analysis": {"samples": 3, "max_share": None},
        "output": {"dir": str(tmp_path / "run")},
    }


@pytest.mark.parametrize("method", ["sorsa", "full"])
def test_a_run_takes_them_and_trains_the_same(settings: dict[str, Any], method: str, tmp_path: Path) -> None:
    if method == "full":
        settings |= {"method": {"name": "full"}}
    folder = train(check_recipe(settings)).folder
    samples = read_objects(folder / "analysis" / "during.jsonl")
    assert [sample["step"] for sample in samples] == [0, 2, 4]
    start, end = (next(iter(sample["layers"].values())) for sample in (samples[0], samples[-1]))
    assert start["relative_change"] < 1e-6
    assert start["delta_d"] < 1e-5
    assert end["relative_change"] > 1e-4
    settings.pop("analysis")
    settings["output"] = {"dir": str(tmp_path / "without")}
    other = train(check_recipe(settings)).folder
    logs = [
        [json.loads(line)["loss"] for line in (f / "train_log.jsonl").read_text().splitlines()] for f in (folder, other)
    ]
    assert logs[0] == logs[1]
