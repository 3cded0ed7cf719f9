"""Trained parameters as both papers count them, through PEFT, on models of the papers' shapes
without any weights."""

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, GPT2Config, GPTJConfig, LlamaConfig

from svdtune import MoSaraConfig, SaraConfig, SorsaConfig

LLAMA_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
LLAMA_13B = {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40}
GPTJ_6B = {"n_embd": 4096, "n_layer": 28, "n_head": 16, "n_inner": 16384, "vocab_size": 50400}


def model_of(config):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def trained_share(model, config) -> tuple[int, float]:
    """Trained parameters, and their share in percent of all parameters of the adapted model, as
    both papers divide."""
    model = get_peft_model(model, config, low_cpu_mem_usage=True)
    assert all(p.is_meta for p in model.parameters())
    trained, all_parameters = model.get_nb_trainable_parameters()
    return trained, 100 * trained / all_parameters


def mean_rank_pattern(model, low: int, share_of_low: float) -> dict[str, int]:
    """Ranks `low` and `low + 1`, `low` on the given share of the q and v projections."""
    names = [name for name, _ in model.named_modules() if name.endswith(("q_proj", "v_proj"))]
    return {name: low + (i >= share_of_low * len(names)) for i, name in enumerate(names)}


@pytest.mark.parametrize(
    ("config", "low", "share_of_low", "percent"),
    [
        pytest.param(LlamaConfig(**LLAMA_7B), 9, 0.87, "7.1e-02", id="LLaMA-7B"),
        pytest.param(LlamaConfig(**LLAMA_13B), 10, 1.0, "6.3e-02", id="LLaMA-13B"),
        pytest.param(GPTJConfig(**GPTJ_6B), 9, 0.76, "7.0e-02", id="GPT-J-6B"),
    ],
)
def test_sara(config, low, share_of_low, percent):
    model = model_of(config)
    pattern = mean_rank_pattern(model, low, share_of_low)
    trained, share = trained_share(model, SaraConfig(threshold=0.01, rank_pattern=pattern))
    width = config.hidden_size
    assert trained == sum(k * (2 * width + 1) for k in pattern.values())
    assert f"{share:.1e}" == percent


@pytest.mark.parametrize(
    ("k", "settings", "percent"),
    [(914, {"num_heads": 5}, "8.5e-03"), (922, {"num_heads": 10, "use_v": False}, "9.0e-03")],
    ids=["with v", "without v"],
)
def test_mosara_on_llama_7b(k, settings, percent):
    trained, share = trained_share(model_of(LlamaConfig(**LLAMA_7B)), MoSaraConfig(r=k, **settings))
    heads, v = settings["num_heads"], 4096 * settings.get("use_v", True)
    assert trained == 64 * (heads * k + k + heads + v)
    assert f"{share:.1e}" == percent


def test_sorsa_on_llama_7b_is_the_papers_320_million():
    trained, _ = trained_share(model_of(LlamaConfig(**LLAMA_7B)), SorsaConfig(r=128))
    assert round(trained / 1e6) == 320


GPT2_MEDIUM = GPT2Config(n_embd=1024, n_layer=24, n_head=16)


def test_sara_on_gpt2_medium_adapts_the_slices_q_and_v():
    """0.33 million at θ = 0.012, which implies a mean rank of 3.36 over the q and v of 24
    layers."""
    model = model_of(GPT2_MEDIUM)
    names = [f"transformer.h.{layer}.attn.c_attn.{part}" for layer in range(24) for part in "qv"]
    pattern = {name: 3 + (i >= 0.64 * len(names)) for i, name in enumerate(names)}
    trained, _ = trained_share(model, SaraConfig(threshold=0.012, rank_pattern=pattern, fused_slices="auto"))
    assert trained == sum(k * (1024 + 1024 + 1) for k in pattern.values())
    assert round(trained / 1e6, 2) == 0.33


def test_mosara_on_gpt2_medium():
    """0.094 million with 3 heads at θ = 0.5."""
    trained, _ = trained_share(
        model_of(GPT2_MEDIUM), MoSaraConfig(r=233, num_heads=3, fused_slices={"c_attn": ["q", "v"]})
    )
    assert trained == 48 * (3 * 233 + 1024 + 233 + 3)
    assert round(trained / 1e6, 3) == 0.094
