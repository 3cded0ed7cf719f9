"""What a tool that sends a merged model's weights to another program takes for them, by TRL's own
rule before vLLM generates; and what being merged leaves of the adapter."""

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import get_peft_model, get_peft_model_state_dict
from test_peft_verbs import FAMILIES, MERGEABLE, config_of, logits, model_of, move
from torch import Tensor

from svdtune.methods.layers.base import SvdLayer

# further adapters beside the first: on its layers, on others, and on slices of a fused weight
BESIDE: dict[str, dict[str, dict[str, Any]]] = {
    "alone": {},
    "same": {"second": {}},
    "others": {"second": {"target_modules": "all-linear"}},
}
SLICES = {"target_modules": ["c_attn"], "fused_slices": {"c_attn": ["q", "v"]}}


def of(name: str, family: str, beside: str = "alone", dtype: torch.dtype = torch.float32, **settings: Any):
    model = move(get_peft_model(model_of(family, dtype), config_of(name, **settings)), 0.1)
    for adapter, other in BESIDE[beside].items():
        model.add_adapter(adapter, config_of(name, **settings | other))
    return model.eval()


def sent_by_trl(model) -> dict[str, Tensor]:
    """Copies of what TRL sends to vLLM, by the names it gives them."""
    generation = pytest.importorskip("trl.generation.vllm_generation").VLLMGeneration
    one_process = SimpleNamespace(is_fsdp=False, gather_params=lambda parameters: nullcontext())
    sender = generation.__new__(generation)
    sender.model, sender._dist = model, one_process
    return {name: tensor.clone() for name, tensor in sender._iter_named_params()}


@pytest.mark.parametrize("beside", BESIDE)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", sorted(MERGEABLE))
def test_the_merged_weights_are_sent_and_nothing_else(name, family, beside):
    expected = dict(of(name, family).merge_and_unload().named_parameters())
    model = of(name, family, beside)
    before, parameters = logits(model), list(map(id, model.parameters()))
    sent = sent_by_trl(model)
    assert sent.keys() == expected.keys() == dict(model_of(family).named_parameters()).keys()
    assert all(torch.equal(sent[key], weight) for key, weight in expected.items())
    assert list(map(id, model.parameters())) == parameters
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("name", sorted(MERGEABLE))
def test_slices_of_a_fused_weight_are_sent_with_it(name):
    model = of(name, "gpt2", **SLICES)
    expected = dict(of(name, "gpt2", **SLICES).merge_and_unload().named_parameters())
    sent = sent_by_trl(model)
    assert sent.keys() == expected.keys()
    assert all(torch.equal(sent[key], weight) for key, weight in expected.items())


@pytest.mark.parametrize("name", sorted(MERGEABLE))
def test_a_merged_adapter_has_all_its_tensors(name):
    """It is saved, copied to another dtype and back, and taken off, as one that is not merged."""
    model = of(name, "llama")
    kept = {key: value.clone() for key, value in get_peft_model_state_dict(model).items()}
    whole = list(model.state_dict())
    model.merge_adapter()
    assert list(model.state_dict()) == whole
    merged = get_peft_model_state_dict(model)
    assert merged.keys() == kept.keys()
    assert all(torch.equal(merged[key], value) for key, value in kept.items())
    model.double()
    model.unmerge_adapter()
    model.float()
    again = get_peft_model_state_dict(model)
    assert all(torch.equal(again[key], value) for key, value in kept.items())
    frozen = [layer.adapter_tensor(part, "default") for layer in layers(model) for part in layer.frozen]
    assert all(isinstance(tensor, torch.nn.Parameter) and not tensor.requires_grad for tensor in frozen)
    model.merge_adapter()
    untouched = dict(model_of("llama").named_parameters())
    assert all(torch.equal(untouched[key], weight) for key, weight in model.unload().named_parameters())


def layers(model) -> list[SvdLayer[Any]]:
    return [module for module in model.modules() if isinstance(module, SvdLayer)]
