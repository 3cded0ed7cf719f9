"""Fused experts: what cannot be adapted is refused, what is left out is named."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from peft import get_peft_model
from test_experts import BOTH, CONFIGS, config_of, made
from torch import nn

from svdtune import MoSaraConfig, SvdtuneError
from svdtune.training.method import method_problems
from tiny import tiny_experts

REFUSED = [
    ({"dropout": 0.1}, "`dropout` is on the input of layers"),
    (
        {"layers_to_transform": [0], "target_modules": ["q_proj"]},
        "`layers_to_transform` chooses among `target_modules`",
    ),
    ({"target_parameters": "experts.down_proj"}, "`target_parameters` must be a list of names"),
]


@pytest.mark.parametrize(
    ("settings", "message"), REFUSED, ids=lambda part: next(iter(part)) if type(part) is dict else ""
)
@pytest.mark.parametrize("method", ["sara", "sorsa"])
def test_settings_that_experts_cannot_have(method, settings, message):
    with pytest.raises(SvdtuneError, match=message):
        config_of(method, **settings)


def test_mosara_is_refused_and_names_are_looked_up():
    with pytest.raises(SvdtuneError, match="Mo-SARA's gate looks at tokens"):
        MoSaraConfig(r=2, target_parameters=BOTH)
    assert "gate looks at tokens" in next(method_problems("mosara", {"target_parameters": BOTH})).message
    assert not list(method_problems("sara", {"target_parameters": BOTH}))
    model = tiny_experts("mixtral")
    with pytest.raises(SvdtuneError, match=r"named 'experts.w1' .* this model has mlp.experts.gate_up_proj \(×1\)"):
        get_peft_model(model, config_of("sara", target_parameters=["experts.w1"]))
    with pytest.raises(SvdtuneError, match="this model has none"):
        get_peft_model(nn.Sequential(nn.Linear(3, 3)), config_of("sara", target_parameters=["0.weight"]))
    experts = model.model.layers[0].mlp.experts
    experts._hf_hook = SimpleNamespace(offload=True)
    with pytest.raises(SvdtuneError, match="is quantized, offloaded or spread"):
        get_peft_model(model, config_of("sara"))
    del experts._hf_hook
    weight = experts.gate_up_proj
    experts.gate_up_proj = nn.Parameter(weight.to(torch.int8), requires_grad=False)
    with pytest.raises(SvdtuneError, match="is quantized, offloaded or spread"):
        get_peft_model(model, config_of("sara"))
    experts.gate_up_proj = weight
    get_peft_model(model, config_of("sara", target_parameters=BOTH[:1]))  # and the model is as it was


@pytest.mark.filterwarnings("error:You have passed exclude_modules")
@pytest.mark.parametrize("method", ["sara", "sorsa"])
@pytest.mark.parametrize("excluded", [["experts.down_proj"], r".*\.down_proj"], ids=["names", "pattern"])
def test_excluded_experts_are_not_adapted(method, excluded):
    model = get_peft_model(tiny_experts("mixtral"), config_of(method, exclude_modules=excluded))
    ranks = model.peft_config["default"].ranks
    assert list(ranks) == [f"model.layers.0.mlp.experts.gate_up_proj.{index}" for index in range(3)]


@pytest.mark.parametrize("method", ["sara", "sorsa"])
@pytest.mark.parametrize("excluded", [["mlp.experts"], BOTH, r".*experts"], ids=["module", "both", "pattern"])
def test_no_expert_that_is_not_excluded(method, excluded):
    with pytest.raises(SvdtuneError, match="`exclude_modules` names every parameter"):
        made("mixtral", method, exclude_modules=excluded)


@pytest.mark.parametrize("method", ["sara", "sorsa"])
@pytest.mark.parametrize("saved", ["mlp", "experts", "layers.0", "gate_up_proj", "model", "perts"])
def test_experts_in_a_module_that_is_saved_whole_are_refused(method, saved):
    model = tiny_experts("mixtral")
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(SvdtuneError, match="which `modules_to_save` trains and saves whole"):
        get_peft_model(model, config_of(method, modules_to_save=[saved]))
    assert [name for name, _ in model.named_modules()] == names


@pytest.mark.parametrize("method", ["sara", "sorsa"])
@pytest.mark.parametrize("name", ["weight", "bias", "merged"])
def test_a_parameter_whose_name_is_taken_is_refused_and_not_offered(method, name):
    model = Block(Experts([name, "w1"]))
    with pytest.raises(SvdtuneError, match=f"have an attribute '{name}' of"):
        get_peft_model(model, config_of(method, target_parameters=[f"experts.{name}"]))
    with pytest.raises(SvdtuneError, match=r"this model has experts\.w1 \(×1\)\."):
        get_peft_model(model, config_of(method, target_parameters=["experts.w2"]))


def test_a_rank_that_an_expert_cannot_have_is_answered_with_its_parameter():
    with pytest.raises(SvdtuneError, match="or leave its parameter out of `target_parameters`"):
        made("mixtral", "sara", r=99)


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
