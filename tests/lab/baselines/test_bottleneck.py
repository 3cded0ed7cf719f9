"""Bottleneck adapters against their equations, and as a PEFT method: start, saving, switching off,
what is refused."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, GPTJConfig, LlamaConfig, LlamaForCausalLM
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

from pairwise import all_pairs
from svdtune.errors import SvdtuneError
from svdtune.lab.baselines import BottleneckConfig, reference
from tiny import tiny_llama

PLACEMENTS = ["series", "parallel"]
IDS = torch.arange(12).reshape(2, 6)


class Block(nn.Module):
    """Layers that widen, narrow and do neither."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.square, self.down = nn.Linear(6, 10), nn.Linear(10, 10), nn.Linear(10, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.square(self.up(x)))


def llama(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 6, "num_key_value_heads": 3}
    model = tiny_llama(**sizes, vocab_size=32, pad_token_id=0, bos_token_id=None, eos_token_id=1)
    return model.to(dtype).train()


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def settings(**others) -> BottleneckConfig:
    return BottleneckConfig(**{"bottleneck_size": 5, "init_weights": False, "task_type": "CAUSAL_LM"} | others)


@pytest.mark.parametrize(("placement", "name", "f"), all_pairs(PLACEMENTS, ["up", "square", "down"], ["tanh", "relu"]))
def test_outputs_and_gradients_are_the_equations(placement, name, f):
    block = Block().double()
    base = getattr(block, name)
    W, bias = base.weight.detach().clone(), base.bias.detach().clone()
    config = BottleneckConfig(
        placement=placement,
        bottleneck_size=3,
        non_linearity=f,
        scaling=0.7,
        init_weights=False,
        target_modules=[name],
    )
    adapted = get_peft_model(block, config, autocast_adapter_dtype=False)
    layer = getattr(adapted.base_model.model, name)
    D, U = layer.bottleneck_down["default"].weight, layer.bottleneck_up["default"].weight
    x = torch.randn(2, 4, W.shape[1], dtype=torch.float64, requires_grad=True)
    y = layer(x)
    expected = getattr(reference, placement)(x, W, bias, D, U, ACT2FN[f], 0.7)
    torch.testing.assert_close(y, expected)
    seed = torch.randn_like(y)
    for ours, theirs in zip(
        torch.autograd.grad(y, (x, D, U), seed), torch.autograd.grad(expected, (x, D, U), seed), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_changes_at_the_start(placement, dtype):
    model = llama(dtype)
    before = logits(model)
    adapted = get_peft_model(model, settings(placement=placement, init_weights=True))
    assert torch.equal(logits(adapted), before)
    names = {name.split(".")[-3] for name, p in adapted.named_parameters() if p.requires_grad}
    assert names == {"bottleneck_down", "bottleneck_up"}
    assert {p.dtype for p in adapted.parameters() if p.requires_grad} == {torch.float32}


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_adapter_comes_back_bit_for_bit(placement, dtype, tmp_path):
    adapted = get_peft_model(llama(dtype), settings(placement=placement, scaling=3.0, non_linearity="gelu")).eval()
    base = logits(llama(dtype))
    after = logits(adapted)
    assert not torch.equal(after, base)
    adapted.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(dtype), tmp_path)
    assert torch.equal(logits(loaded), after)
    with loaded.disable_adapter():
        assert torch.equal(logits(loaded), base)
    assert torch.equal(logits(loaded.unload()), base)


def test_adapters_are_switched_and_deleted():
    adapted = get_peft_model(llama(), settings()).eval()
    first = logits(adapted)
    adapted.add_adapter("other", settings(placement="parallel"))
    adapted.set_adapter("other")
    assert not torch.equal(logits(adapted), first)
    adapted.set_adapter("default")
    assert torch.equal(logits(adapted), first)
    adapted.delete_adapter("other")
    assert torch.equal(logits(adapted), first)


def test_dropout_acts_in_training_alone():
    adapted = get_peft_model(llama(), settings(dropout=0.5))
    assert not torch.equal(logits(adapted.train()), logits(adapted.train()))
    assert torch.equal(logits(adapted.eval()), logits(adapted.eval()))


def test_conv1d_is_a_linear_layer_with_its_weight_transposed():
    model = nn.Sequential(Conv1D(10, 6))
    layer = get_peft_model(model, BottleneckConfig(target_modules=["0"], bottleneck_size=3)).base_model.model[0]
    # it widens: the adapter is before it
    assert layer.bottleneck_down["default"].weight.shape == (3, 6)


LLAMA_7B = LlamaConfig()
LLAMA_13B = LlamaConfig(
    hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40, num_key_value_heads=40
)


@pytest.mark.parametrize(
    ("config", "settings", "percent"),
    [
        (LLAMA_7B, {"placement": "series"}, 2.9),
        (LLAMA_7B, {"placement": "parallel"}, 2.9),
        (LLAMA_13B, {"placement": "series"}, 2.4),
        (LLAMA_13B, {"placement": "parallel"}, 2.4),
        (GPTJConfig(), {"placement": "series"}, 1.9),
        (GPTJConfig(), {"placement": "parallel"}, 2.8),
        # Table 2, quoted from LLM-Adapters
        (LLAMA_7B, {"placement": "series", "target_modules": ["down_proj"]}, 0.99),
        (LLAMA_7B, {"placement": "parallel", "target_modules": ["up_proj", "down_proj"]}, 3.5),
        (LLAMA_13B, {"placement": "series", "target_modules": ["down_proj"]}, 0.80),
        (LLAMA_13B, {"placement": "parallel", "target_modules": ["up_proj", "down_proj"]}, 2.9),
    ],
)
def test_as_much_is_trained_as_saras_tables_say(config, settings, percent):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        adapted = get_peft_model(model, BottleneckConfig(**settings), low_cpu_mem_usage=True)
    trained, total = adapted.get_nb_trainable_parameters()
    assert 100 * trained / total == pytest.approx(percent, abs=0.05 if percent > 1 else 0.01)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_merging_is_refused_and_changes_nothing(placement):
    adapted = get_peft_model(llama(), settings(placement=placement)).eval()
    before = logits(adapted)
    for merge in (adapted.merge_adapter, adapted.merge_and_unload):
        with pytest.raises(SvdtuneError, match=r"cannot be merged: its nonlinearity"):
            merge()
    assert torch.equal(logits(adapted), before)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"placement": "beside"}, r"`placement` must be one of 'series', 'parallel'; got 'beside'"),
        ({"bottleneck_size": 0}, r"`bottleneck_size` must be a whole number of at least 1; got 0"),
        ({"non_linearity": "tan"}, r"`non_linearity` must be one of Transformers' \(.*tanh.*\); got 'tan'"),
        ({"non_linearity": "prelu"}, r"`non_linearity` must be one of .*; got 'prelu'"),
        ({"scaling": float("nan")}, r"`scaling` must be a finite number; got nan"),
        ({"dropout": 1.0}, r"`dropout` must lie in \[0, 1\); got 1.0"),
    ],
)
def test_wrong_settings(wrong, message):
    with pytest.raises(SvdtuneError, match=message):
        BottleneckConfig(**wrong)


def test_layers_that_are_no_linear_ones_are_refused():
    with pytest.raises(SvdtuneError, match=r"'model.embed_tokens' is a Embedding"):
        get_peft_model(llama(), settings(target_modules=["embed_tokens"]))


def test_an_architecture_without_usual_targets_asks_for_them():
    with pytest.raises(SvdtuneError, match=r"no usual target modules for 'custom'; name them in `target_modules`"):
        get_peft_model(Block(), BottleneckConfig())


@pytest.mark.parametrize("f", sorted(set(ACT2FN) - {"prelu", "xielu"}))
def test_every_nonlinearity_that_is_offered_has_no_parameters(f):
    layer = get_peft_model(
        nn.Sequential(nn.Linear(3, 3)), settings(target_modules=["0"], non_linearity=f, task_type=None)
    )
    assert layer.get_nb_trainable_parameters()[0] == 2 * 5 * 3
