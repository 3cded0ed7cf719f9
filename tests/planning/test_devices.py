"""Memory by setting: against measured steps, and by what must hold whatever the
numbers."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM

from pairwise import all_pairs
from svdtune import MoSaraConfig, SaraConfig, SorsaConfig
from svdtune.checkpoint import SHAPES, Checkpoint, open_shape
from svdtune.errors import SvdtuneError
from svdtune.planning import (
    Setting,
    anatomy,
    cheapest,
    devices_needed,
    estimate,
    fits,
    least,
    plan,
)
from svdtune.planning.levers import RESERVE

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
QV = ["q_proj", "v_proj"]
CONFIGS = {"sara": SaraConfig, "mosara": MoSaraConfig, "sorsa": SorsaConfig, "lora": LoraConfig}
GIB = 2**30
# Contender of benchmarks/step.py → (method, rank, targets).
LLAMA = {
    "sorsa-delta": ("sorsa", 128, "all-linear"),
    "sorsa-delta-without-regularizer": ("sorsa", 128, "all-linear"),
    "sorsa-delta-dropout": ("sorsa", 128, "all-linear"),
    "sara-all": ("sara", 128, "all-linear"),
    "sara-qv": ("sara", 9, QV),
    "mosara-qv-5-heads": ("mosara", 914, QV),
    "lora": ("lora", 128, "all-linear"),
    "pissa": ("lora", 128, "all-linear"),
    "lora-qv-r8": ("lora", 8, QV),
}
SMOLLM2 = {
    "sorsa-delta": ("sorsa", 64, "all-linear"),
    "lora": ("lora", 64, "all-linear"),
    "lora-qv-r8": ("lora", 8, QV),
    "sara-qv": ("sara", 9, QV),
}


def measured(file):
    lines = (json.loads(line) for line in (RESULTS / file).read_text().splitlines())
    return {line["contender"]: line for line in lines}


def smollm2():
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
    config = LlamaConfig(**sizes, vocab_size=49152, tie_word_embeddings=True, num_hidden_layers=30)
    with torch.device("meta"):
        return Checkpoint("smollm2", LlamaForCausalLM(config), {}, 0)


def sizes_of(checkpoint, method, r, targets):
    made = plan(checkpoint, CONFIGS[method](r=r, target_modules=targets))
    return made, anatomy(made, checkpoint.model)


@cache
def sorsa_sizes(shape):
    return sizes_of(open_shape(shape), "sorsa", 128, "all-linear")[1]


@pytest.mark.parametrize("contender", LLAMA)
def test_memory_is_within_5_percent_of_steps_of_llama_7b_shapes(contender):
    line = measured("step-llama-7b-h100.jsonl")[contender]
    made, sizes = sizes_of(open_shape("llama-7b", layers=8), *LLAMA[contender])
    if contender != "pissa" and not contender.startswith("lora"):
        assert made.trained == line["trained"]
    total = estimate(sizes, Setting(batch_size=line["batch"], length=line["length"])).total
    assert 1 <= total / GIB / line["peak_gib"] <= 1.05


@pytest.mark.parametrize("contender", SMOLLM2)
def test_memory_is_within_10_percent_of_steps_of_smollm2_shapes(contender):
    line = measured("step-smollm2-h100.jsonl")[contender]
    made, sizes = sizes_of(smollm2(), *SMOLLM2[contender])
    assert made.trained == line["trained"]
    total = estimate(sizes, Setting(batch_size=line["batch"], length=line["length"])).total
    assert 0.98 <= total / GIB / line["peak_gib"] <= 1.10


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("llama-7b", 6.738),
        ("llama-13b", 13.016),
        ("llama-70b", 68.977),
        ("llama-3.1-70b", 70.554),
        ("llama-405b", 405.853),
    ],
)
def test_shapes_have_the_published_numbers_of_parameters(name, billions):
    assert name in SHAPES
    assert sum(p.numel() for p in open_shape(name).model.parameters()) / 1e9 == pytest.approx(billions, abs=0.001)


def test_shapes_have_no_weights_to_take_ranks_from():
    with pytest.raises(
        SvdtuneError, match=r"llama-7b is a shape without weights, and a threshold, .* take them; give r"
    ):
        plan(open_shape("llama-7b"), SaraConfig(threshold=0.1))


@pytest.fixture(scope="module")
def llama():
    return sorsa_sizes("llama-7b")


def test_what_each_strategy_shares_out(llama):
    one = estimate(llama, Setting())
    ddp = estimate(llama, Setting("ddp", 8))
    assert (ddp.weights, ddp.optimizer, ddp.gathered) == (one.weights, one.optimizer, 0)
    assert ddp.gradients == 2 * one.gradients
    zero2 = estimate(llama, Setting("zero2", 8))
    assert (zero2.weights, zero2.frozen) == (one.weights, one.frozen)
    assert (zero2.gradients, zero2.optimizer) == (one.gradients // 8, one.optimizer * 3 // 2 // 8)
    for strategy in ("fsdp2", "zero3"):
        sharded = estimate(llama, Setting(strategy, 8))
        assert (sharded.weights, sharded.frozen) == (one.weights // 8, one.frozen // 8)
        assert sharded.gradients == one.gradients // 8
        assert sharded.gathered > 2 * 2 * llama.block + 2 * llama.head
    assert all(found.activations == one.activations for found in (ddp, zero2, sharded))
    assert estimate(llama, Setting("fsdp2", 16)).total < estimate(llama, Setting("fsdp2", 8)).total


def test_offload_moves_and_loses_nothing(llama):
    for strategy in ("fsdp2", "zero3", "zero2"):
        here, moved = (estimate(llama, Setting(strategy, 4, offload=offload)) for offload in (False, True))
        assert moved.total + moved.host == here.total
        assert moved.host > here.host == 0
    assert estimate(llama, Setting("fsdp2", 4, offload=True)).weights == 0
    with pytest.raises(SvdtuneError, match="ddp keeps everything on every device"):
        Setting("ddp", offload=True)


def test_quantization_and_checkpointing_take_less(llama):
    plain = estimate(llama, Setting(batch_size=4, length=1024))
    four = estimate(llama, Setting(batch_size=4, length=1024, dtype="int4"))
    assert 0.5 / 2 < four.weights / plain.weights < 0.35
    again = estimate(llama, Setting(batch_size=4, length=1024, gradient_checkpointing=True))
    assert again.activations < plain.activations / 6
    assert again.total < plain.total


@pytest.mark.parametrize(
    ("name", "devices", "strategy"),
    all_pairs(["llama-7b", "llama-13b", "llama-70b", "llama-405b"], [1, 8, 64], ["ddp", "fsdp2"]),
)
@pytest.mark.family(3)
def test_what_is_chosen_fits_and_nothing_cheaper_does(name, devices, strategy):
    sizes = sorsa_sizes(name)
    asked = Setting(strategy, devices, batch_size=8, length=2048)
    for gib in (24, 80, 141):
        choice = cheapest(sizes, asked, gib * GIB)
        if choice is None:
            assert not fits(least(sizes, asked)[1], gib * GIB)
            continue
        chosen = choice.setting
        assert choice.memory == estimate(sizes, chosen)
        assert choice.memory.total <= (1 - RESERVE) * gib * GIB
        assert chosen.batch_size * chosen.accumulation == asked.batch_size * asked.accumulation
        pulled = {
            "batch": chosen.batch_size < asked.batch_size,
            "checkpointing": chosen.gradient_checkpointing,
            "strategy": chosen.strategy != strategy,
            "offload": chosen.offload,
            "4-bit": chosen.dtype == "int4",
        }
        assert {lever for lever, is_pulled in pulled.items() if is_pulled} == set(choice.why)
        smallest = replace(chosen, batch_size=1, gradient_checkpointing=True)
        if chosen.dtype == "int4":
            assert not fits(estimate(sizes, replace(smallest, dtype="bfloat16")), gib * GIB)
        if chosen.offload:
            assert not fits(estimate(sizes, replace(smallest, offload=False)), gib * GIB)
        if chosen.strategy != strategy:
            assert not fits(estimate(sizes, replace(smallest, strategy=strategy, offload=False)), gib * GIB)
        # of the batch and checkpointing, neither is pulled for nothing
        other = replace(chosen, batch_size=8, accumulation=1)
        assert other == chosen or not fits(estimate(sizes, other), gib * GIB)
        other = replace(chosen, gradient_checkpointing=False)
        assert other == chosen or not fits(estimate(sizes, other), gib * GIB)


@pytest.mark.parametrize("gib", [16, 24, 80])
def test_how_many_devices_would_do_without_the_dearest_levers(gib):
    sizes = sorsa_sizes("llama-70b")
    asked = Setting("fsdp2", 1, length=512)
    assert {"offload", "4-bit"} & set(cheapest(sizes, asked, gib * GIB).why)
    needed = devices_needed(sizes, asked, gib * GIB)
    for devices, plain in ((needed, True), (needed // 2, False)):
        choice = cheapest(sizes, replace(asked, devices=devices), gib * GIB)
        assert (not choice.setting.offload and choice.setting.dtype == "bfloat16") == plain
    assert devices_needed(sizes, asked, 4 * GIB) is None  # what is gathered stays, however many
