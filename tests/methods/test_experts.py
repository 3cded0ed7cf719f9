"""Experts that are fused into one tensor are said to be left out, where their names were asked
for."""

import warnings

import pytest
import torch
from peft import get_peft_model
from torch import nn

from svdtune import MoSaraConfig, SaraConfig, SorsaConfig

CONFIGS = {"sara": SaraConfig, "mosara": MoSaraConfig, "sorsa": SorsaConfig}


class Experts(nn.Module):
    def __init__(self, names):
        super().__init__()
        for name in names:
            self.register_parameter(name, nn.Parameter(torch.zeros(4, 6, 6)))


class Block(nn.Module):
    def __init__(self, experts):
        super().__init__()
        self.q_proj, self.gate_proj, self.experts = nn.Linear(6, 6), nn.Linear(6, 6), experts


FUSED = {
    "qwen3": lambda: Experts(["gate_up_proj", "down_proj"]),
    "mixtral": lambda: Experts(["w1", "w2", "w3"]),
}


def said(model, config) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        get_peft_model(model, config)
    return [str(one.message) for one in caught if "experts are not adapted" in str(one.message)]


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("kind", FUSED)
@pytest.mark.parametrize("targets", [["q_proj", "gate_proj"], ["q_proj", "w1"], "all-linear"])
def test_fused_experts_that_were_asked_for_are_named(method, kind, targets):
    (message,) = said(Block(FUSED[kind]()), CONFIGS[method](r=2, target_modules=targets))
    assert "experts." in message


@pytest.mark.parametrize("method", CONFIGS)
def test_nothing_is_said_of_attention_or_of_experts_that_are_layers(method):
    assert said(Block(FUSED["qwen3"]()), CONFIGS[method](r=2, target_modules=["q_proj"])) == []
    layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
    assert said(Block(layers), CONFIGS[method](r=2, target_modules=["gate_proj", "0", "1"])) == []
