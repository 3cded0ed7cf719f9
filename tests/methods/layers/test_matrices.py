"""The weight that acts, the one it started from and the trained product, for every method, against
the layers' outputs."""

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import nn
from transformers import LlamaForCausalLM

from svdtune import MoSaraConfig, SaraConfig, SorsaConfig
from svdtune.errors import SvdtuneError
from svdtune.methods.layers.matrices import observed_layers
from tiny import tiny_gpt2, tiny_llama

TARGETS = ["q_proj", "v_proj"]
METHODS = {
    "sara": SaraConfig(threshold=0.3, target_modules=TARGETS),
    "mosara": MoSaraConfig(threshold=0.3, num_heads=1, target_modules=TARGETS),
    "sorsa": SorsaConfig(r=3, target_modules=TARGETS),
    "lora": LoraConfig(r=3, lora_alpha=5, target_modules=TARGETS),
    "pissa": LoraConfig(r=3, init_lora_weights="pissa", target_modules=TARGETS),
    "dora": LoraConfig(r=3, use_dora=True, target_modules=TARGETS),
}


def tiny() -> LlamaForCausalLM:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
    return tiny_llama(vocab_size=32, **sizes).train()


def disturb(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)


@pytest.mark.parametrize("method", METHODS)
def test_weights_of_every_method(method: str) -> None:
    base = tiny()
    before = {name: module.weight.detach().clone() for name, module in base.named_modules() if name.endswith("_proj")}
    model = get_peft_model(base, METHODS[method])
    layers = observed_layers(model)
    assert [layer.name for layer in layers] == [
        f"model.layers.{depth}.self_attn.{kind}" for depth in (0, 1) for kind in TARGETS
    ]
    for layer in layers:
        torch.testing.assert_close(layer.start(), before[layer.name], rtol=0, atol=1e-6)
    disturb(model)
    for layer in layers:
        x = torch.randn(5, 16)
        torch.testing.assert_close(layer.module(x), x @ layer.weight().mT, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["sara", "mosara", "sorsa", "lora"])
def test_the_added_product_is_the_change(method: str) -> None:
    model = get_peft_model(tiny(), METHODS[method])
    start = {layer.name: layer.start() for layer in observed_layers(model)}
    disturb(model)
    for layer in observed_layers(model):
        A, B = layer.added_pair()
        torch.testing.assert_close(B @ A.mT, layer.weight() - start[layer.name], rtol=1e-4, atol=1e-5)


def test_the_trained_product_of_sorsa_and_pissa_is_the_principal_part() -> None:
    for config in (METHODS["sorsa"], METHODS["pissa"]):
        layer = observed_layers(get_peft_model(tiny(), config))[0]
        A, B = layer.trained_pair()
        expected = torch.linalg.svdvals(layer.start())[:3]
        torch.testing.assert_close(torch.linalg.svdvals(B @ A.mT)[:3], expected, rtol=1e-4, atol=1e-5)


def test_orthonormality_is_that_of_sorsa_factors() -> None:
    model = get_peft_model(tiny(), METHODS["sorsa"])
    layer = observed_layers(model)[0]
    assert max(layer.orthonormality().values()) < 1e-5
    with torch.no_grad():
        layer.module.sorsa_U["default"] *= 2
    assert layer.orthonormality()["U"] == pytest.approx(3 * 3**0.5, rel=1e-4)
    assert observed_layers(get_peft_model(tiny(), METHODS["lora"]))[0].orthonormality() == {}


def test_without_an_adapter_all_linear_layers_but_the_head() -> None:
    model = tiny()
    names = [layer.name for layer in observed_layers(model)]
    assert len(names) == 14
    assert "lm_head" not in names
    assert observed_layers(model)[0].trained_pair() is None


def test_several_heads_are_no_matrix_and_slices_are_layers() -> None:
    several = MoSaraConfig(threshold=0.3, num_heads=3, target_modules=TARGETS)
    assert observed_layers(get_peft_model(tiny(), several)) == []
    gpt2 = tiny_gpt2(vocab_size=32, n_positions=16, n_embd=16, n_layer=1, n_head=2).train()
    config: PeftConfig = SaraConfig(threshold=0.3, target_modules=["c_attn"], fused_slices="auto")
    layers = observed_layers(get_peft_model(gpt2, config))
    assert [layer.name.rpartition(".")[2] for layer in layers] == ["q", "v"]
    assert all(layer.weight().shape == (16, 16) for layer in layers)


def test_only_what_is_wanted() -> None:
    layers = observed_layers(tiny(), lambda name: name.endswith("q_proj"))
    assert len(layers) == 2


@pytest.mark.parametrize("first", ["sara", "sorsa", "lora"])
def test_each_layer_is_looked_at_with_the_adapter_that_acts_on_it(first: str) -> None:
    config = METHODS[first]
    model = get_peft_model(tiny(), replace(config, target_modules=["q_proj"]), adapter_name="one")
    model.add_adapter("two", replace(config, target_modules=["v_proj"]))
    model.base_model.set_adapter(["one", "two"])
    disturb(model)
    layers = observed_layers(model)
    assert {(layer.name[-6:], layer.adapter) for layer in layers} == {("q_proj", "one"), ("v_proj", "two")}
    for layer in layers:
        x = torch.randn(5, 16)
        torch.testing.assert_close(layer.module(x), x @ layer.weight().mT, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["sara", "mosara", "sorsa", "lora", "dora"])
def test_several_adapters_on_one_layer_are_named(method: str) -> None:
    model = get_peft_model(tiny(), METHODS[method], adapter_name="one")
    model.add_adapter("two", METHODS[method])
    model.base_model.set_adapter(["one", "two"])
    with pytest.raises(
        SvdtuneError, match=r"2 adapters act on .*q_proj: one, two\. .* choose it with model\.set_adapter\('one'\)"
    ):
        observed_layers(model)
    model.set_adapter("two")
    assert {layer.adapter for layer in observed_layers(model)} == {"two"}
