"""Mo-SARA's other gates: against the literal form, through PEFT, and what merges."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from svdtune import MoSaraConfig
from svdtune.errors import SvdtuneError
from svdtune.methods.mosara import gates, reference
from svdtune.methods.mosara.reference import trainable_parameters
from svdtune.training.method import method_problems

TARGETS = ["q_proj", "v_proj", "down_proj"]


def top1(weights):
    """The largest of each row, and zeros."""
    return torch.stack([torch.where(row == row.max(), row, torch.zeros_like(row)) for row in weights])


def made(model, gate, moved=True, **settings):
    config = MoSaraConfig(r=4, gate=gate, target_modules=TARGETS, task_type="CAUSAL_LM", **{"num_heads": 3} | settings)
    adapted = get_peft_model(model, config).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if moved and "mosara_" in name:
                parameter.copy_(torch.randn_like(parameter))
    return adapted


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(12).view(2, 6)).logits


@pytest.fixture
def base(tiny_folder):
    return lambda: AutoModelForCausalLM.from_pretrained(tiny_folder)


@pytest.mark.parametrize("front", [False, True])
@pytest.mark.parametrize("gate", gates.GATES)
def test_a_layer_computes_the_literal_form(base, gate, front):
    model = made(base(), gate, v_position="front" if front else "after")
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    x = torch.randn(2, 5, layer.in_features, requires_grad=True)
    lam, v, w1, w2, U, V = (
        layer.adapter_tensor(name, "default")
        for name in ("mosara_lambda", "mosara_v", "mosara_w1", "mosara_w2", "frozen_U", "frozen_V")
    )
    weight = layer.get_base_layer().weight
    changed = {"changed": top1} if gate == "top1" else {}
    want = reference.mosara_linear(x.view(10, -1), weight, None, U, V, lam, v, w1, w2, front, **changed)
    leaves = [t for t in (x, lam, v, w1, w2) if t is not None]
    upstream = torch.randn(2, 5, layer.out_features)
    torch.testing.assert_close(layer(x), want.view(2, 5, -1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        torch.autograd.grad((layer(x) * upstream).sum(), leaves),
        torch.autograd.grad((want.view(2, 5, -1) * upstream).sum(), leaves),
        rtol=1e-3,
        atol=1e-4,
    )


@pytest.mark.parametrize("gate", gates.GATES)
def test_the_model_starts_unchanged_and_the_count_is_the_formulas(base, gate):
    model, untouched = made(base(), gate, moved=False), base().eval()
    assert torch.equal(logits(model), logits(untouched))
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    shapes = [(m.in_features, m.out_features) for name, m in untouched.named_modules() if name.endswith(tuple(TARGETS))]
    assert trained == sum(trainable_parameters(4, i, o, num_heads=3, gate=gate) for i, o in shapes)
    router = any("mosara_w1" in name for name, _ in model.named_parameters())
    assert router == (gate != "none")


@pytest.mark.parametrize("gate", ["top1", "none"])
def test_a_saved_adapter_computes_the_same(base, gate, tmp_path):
    model = made(base(), gate)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(), tmp_path).eval()
    assert loaded.peft_config["default"].gate == gate
    assert torch.equal(logits(loaded), logits(model))


def test_without_a_gate_it_merges_and_comes_apart_again(base):
    model = made(base(), "none")
    before = logits(model)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits(model.merge_and_unload()), before, rtol=1e-4, atol=1e-4)


def test_several_heads_without_a_gate_are_one_head_of_their_mean(base):
    several, one = made(base(), "none"), made(base(), "softmax", num_heads=1)
    heads, single = dict(several.named_parameters()), dict(one.named_parameters())
    with torch.no_grad():
        for name, parameter in single.items():
            parameter.copy_(heads[name].mean(0, keepdim=True) if "mosara_lambda" in name else heads[name])
    assert torch.equal(logits(several), logits(one))


def test_top1_does_not_merge(base):
    model = made(base(), "top1")
    before = logits(model)
    with pytest.raises(SvdtuneError, match=r"3 heads, which cannot be merged.*gate='none'"):
        model.merge_and_unload()
    assert torch.equal(logits(model), before)
    assert not model.base_model.supports_lora_conversion()
    assert made(base(), "none").base_model.supports_lora_conversion()


@pytest.mark.parametrize("gate", ["top1", "none"])
def test_two_adapters_and_dropout_take_the_other_path(base, gate):
    model = made(base(), gate)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    x = torch.randn(3, layer.in_features)
    alone = layer(x) - layer.get_base_layer()(x)
    # a hooked layer is called, not computed with
    layer.get_base_layer().register_forward_hook(lambda *_: None)
    torch.testing.assert_close(layer(x) - layer.get_base_layer()(x), alone, rtol=1e-4, atol=1e-5)
    dropped = made(base(), gate, dropout=0.5).train()
    first, second = logits(dropped), logits(dropped)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("gate", gates.GATES)
def test_a_convolution_of_one_pixel_is_a_linear_layer(gate):
    torch.manual_seed(0)
    convolution, linear = nn.Conv2d(6, 5, 1, bias=False), nn.Linear(6, 5, bias=False)
    with torch.no_grad():
        linear.weight.copy_(convolution.weight[:, :, 0, 0])
    config = {"r": 3, "num_heads": 3, "gate": gate, "target_modules": ["0"]}
    both = [get_peft_model(nn.Sequential(layer), MoSaraConfig(**config)) for layer in (convolution, linear)]
    with torch.no_grad():
        for one, other in zip(*(model.parameters() for model in both), strict=True):
            other.copy_(torch.randn_like(other) if other.requires_grad else one.view_as(other))
            one.copy_(other.view_as(one))
    x = torch.randn(2, 6, 4, 4)
    want = both[1](x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    torch.testing.assert_close(both[0](x), want, rtol=1e-4, atol=1e-5)


def test_recipes_know_the_gate():
    assert not list(method_problems("mosara", {"gate": "top1"}))
    problems = [str(problem) for problem in method_problems("mosara", {"gate": "top2"})]
    assert len(problems) == 1
    assert "`gate` must be one of" in problems[0]


def test_an_unknown_gate_is_refused():
    with pytest.raises(SvdtuneError, match="`gate` must be one of softmax, none, top1; got 'top2'"):
        MoSaraConfig(gate="top2")
