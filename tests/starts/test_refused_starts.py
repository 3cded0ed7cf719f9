"""Starts that cannot be made say which layer or setting it is, and leave the weights as they
were."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

import svdtune
from svdtune import SvdtuneError, fast_starts
from tiny import tiny_experts, tiny_llama

Q_PROJ = "model.layers.1.self_attn.q_proj"


def lora(init="pissa", **settings):
    return LoraConfig(**{"r": 4, "init_lora_weights": init, "target_modules": ["q_proj"], **settings})


def broken():
    model = tiny_llama()
    model.get_submodule(Q_PROJ).weight.data[3, 3] = float("nan")
    return model


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"trainable_token_indices": [1]}, r"token_adapter\S* otherwise \(.* single tokens and the like\); put it on"),
        (
            {"layer_replication": [[0, 2], [0, 2]]},
            "layer_replication makes others of them; put the configuration on the loaded",
        ),
        ({"lora_alpha": 0}, r"q_proj: PiSSA divides .* here it is 0; give a lora_alpha above 0"),
        ({"lora_alpha": -4}, "here it is -1; give a lora_alpha above 0"),
        ({"alpha_pattern": {Q_PROJ: -8}}, rf"{Q_PROJ}: PiSSA divides .* here it is -2"),
    ],
    ids=str,
)
def test_from_disk(settings, words, tmp_path):
    tiny_llama(tie_word_embeddings=False).save_pretrained(tmp_path / "base")
    with pytest.raises(SvdtuneError, match=words):
        svdtune.start(tmp_path / "base", lora(**settings), tmp_path / "made")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


@pytest.mark.filterwarnings("ignore:The following rank_pattern keys")  # of PEFT's own, for all-linear
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj"]], ids=str)
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_fused_experts(init, targets, tmp_path):
    more = {} if targets == "all-linear" else {"target_parameters": ["experts.down_proj"]}
    model = tiny_experts("qwen3_moe")
    model.save_pretrained(tmp_path / "base")
    with pytest.raises(
        SvdtuneError, match=r"fused parameters \(\S+\), which PEFT starts from no decomposition; name linear"
    ):
        svdtune.start(tmp_path / "base", lora(init, r=2, target_modules=targets, **more), tmp_path / "made")
    with pytest.raises(
        SvdtuneError, match=r"starts layers from their weight, and '\S+' object has no attribute 'weight'; name"
    ):
        svdtune.start(model, lora(init, r=2, target_modules=targets, **more))


@pytest.mark.parametrize("init", ["pissa", "olora", "mica"])
def test_a_weight_with_nan_is_named(init, tmp_path):
    broken().save_pretrained(tmp_path / "base")
    with pytest.raises(SvdtuneError, match=f"{Q_PROJ}: the weight holds NaN"):
        svdtune.start(tmp_path / "base", lora(init), tmp_path / "made")


def test_nan_in_a_loaded_model_and_in_a_difference(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    broken().save_pretrained(tmp_path / "tuned")
    with pytest.raises(SvdtuneError, match=f"{Q_PROJ}.weight: the weight holds NaN"):
        svdtune.export_lora(tmp_path / "tuned", tmp_path / "lora", base=tmp_path / "base", rank=2)
    with pytest.raises(SvdtuneError, match=r"cannot be decomposed for lora \(.*non-finite.*\); check the checkpoint"):
        svdtune.start(broken(), lora())


def test_weights_on_the_meta_device():
    with torch.device("meta"):
        model = tiny_llama()
    with pytest.raises(SvdtuneError, match="on the meta device and have no values; load them first, or name"):
        svdtune.start(model, lora())


@pytest.mark.parametrize(
    ("components", "settings", "words"),
    [
        ((20, 24), {}, r"the band \(20, 24\) lies outside the spectrum of a weight \(16, 32\)"),
        (
            (12, 16),
            {"rank_pattern": {"v_proj": 2}},
            r"\(12, 16\) must be \(start, stop\) with stop − start = r, here 2",
        ),
        ("first", {"alpha_pattern": {"v_proj": -8}}, "PiSSA divides .* here it is -2; give a lora_alpha above 0"),
    ],
    ids=["band", "length", "alpha"],
)
def test_no_weight_is_changed_before_all_are_looked_at(components, settings, words):
    model = tiny_llama(num_key_value_heads=2)
    before = {name.replace(".base_layer", ""): weight.clone() for name, weight in model.named_parameters()}
    with pytest.raises(SvdtuneError, match=words), fast_starts(components):
        get_peft_model(model, lora(target_modules=["q_proj", "v_proj"], **settings))
    for name, weight in model.named_parameters():
        if ".lora_" not in name:
            assert torch.equal(weight, before[name.replace(".base_layer", "")])
