"""DyLoRA against its equation for every rank, and as a PEFT method: draws, saving, merging, what is
refused."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from svdtune.errors import SvdtuneError
from svdtune.lab.baselines import DyLoraConfig, reference
from svdtune.lab.baselines.dylora import NestedRank


class Pair(nn.Module):
    """Two layers, the first with its weight transposed."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = Conv1D(10, 6), nn.Linear(10, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


def adapted(dtype: torch.dtype = torch.float32, **others) -> PeftModel:
    settings = {"r": 4, "lora_alpha": 6, "target_modules": ["second"], "init_lora_weights": False} | others
    return get_peft_model(Pair().to(dtype), DyLoraConfig(**settings))


X = torch.linspace(-1, 1, 30).reshape(5, 6)


@pytest.mark.parametrize("b", [1, 2, 3, 4])
def test_outputs_and_gradients_are_the_equation(b):
    model = get_peft_model(
        Pair().double(),
        DyLoraConfig(r=4, lora_alpha=6, target_modules=["second"], init_lora_weights=False),
        autocast_adapter_dtype=False,
    ).train()
    layer = model.base_model.model.second
    layer.nested.share = torch.tensor((b - 0.5) / 4)
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    x = torch.randn(5, 10, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    expected = reference.dylora(x, layer.base_layer.weight, layer.base_layer.bias, A, B, 6, b)
    torch.testing.assert_close(y, expected)
    seed = torch.randn_like(y)
    ours, theirs = (torch.autograd.grad(out, (x, A, B), seed) for out in (y, expected))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)
    assert not ours[1][b:].any()
    assert not ours[2][:, b:].any()


def test_outside_of_training_it_is_the_whole_lora():
    model = adapted().eval()
    lora = get_peft_model(
        Pair(), LoraConfig(r=4, lora_alpha=6, target_modules=["second"], init_lora_weights=False)
    ).eval()
    lora.load_state_dict(model.state_dict())
    assert torch.equal(model(X), lora(X))


def test_each_forward_pass_draws_one_rank_for_all_layers():
    model = adapted(target_modules=["first", "second"], rank_pattern={"first": 2}).train()
    ranks = []
    for _ in range(200):
        model(X)
        ranks.append([int(layer.nested.of(layer.r["default"], 1, X.device)) for layer in layers(model)])
    # the same share of each
    assert {tuple(pair) for pair in ranks} == {(1, 1), (1, 2), (2, 3), (2, 4)}


def layers(model: PeftModel) -> list[nn.Module]:
    return [model.base_model.model.first, model.base_model.model.second]


def test_ranks_are_drawn_uniformly_from_r_min_to_r():
    nested, model = NestedRank(), Pair()
    drawn = []
    for _ in range(3000):
        nested.draw(model, ())
        drawn.append(int(nested.of(5, 3, torch.device("cpu"))))
    counts = [drawn.count(b) for b in range(7)]
    assert counts[3] + counts[4] + counts[5] == 3000
    assert min(counts[3:6]) > 900


def test_nothing_changes_at_the_start():
    model = get_peft_model(Pair(), DyLoraConfig(r=4, target_modules=["first", "second"]))
    assert torch.equal(model.train()(X), Pair()(X))
    assert torch.equal(model.eval()(X), Pair()(X))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_adapter_comes_back_bit_for_bit(dtype, tmp_path):
    model = adapted(dtype, target_modules=["first", "second"], r_min=2).eval()
    x, base = X.to(dtype), Pair().to(dtype)(X.to(dtype))
    after = model(x)
    assert not torch.equal(after, base)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(Pair().to(dtype), tmp_path)
    assert loaded.peft_config["default"].r_min == 2
    assert torch.equal(loaded(x), after)
    with loaded.disable_adapter():
        assert torch.equal(loaded(x), base)
    assert torch.equal(loaded.unload()(x), base)


def test_it_merges_as_lora():
    model = adapted(target_modules=["first", "second"]).eval()
    after = model(X)
    torch.testing.assert_close(copy.deepcopy(model).merge_and_unload()(X), after)


def test_the_same_seed_draws_the_same_ranks():
    model = adapted().train()
    outputs = []
    for _ in range(2):
        torch.manual_seed(3)
        outputs.append(torch.stack([model(X).detach() for _ in range(5)]))
    assert torch.equal(*outputs)
    assert len({float(out.sum()) for out in outputs[0]}) > 1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"r": 0}, r"`?r`? .*0"),
        ({"r": 4, "r_min": 5}, r"`r_min` must be a whole number from 1 to r = 4; got 5"),
        ({"use_dora": True}, r"`use_dora` is none of DyLoRA's settings; got True"),
        ({"use_rslora": True}, r"`use_rslora` is none of DyLoRA's settings"),
        ({"init_lora_weights": "pissa"}, r"`init_lora_weights` must be one of True, False, 'gaussian'; got 'pissa'"),
        ({"rank_pattern": {"q": 0}}, r"`rank_pattern\['q'\]` must be a whole number of at least 1; got 0"),
    ],
)
def test_wrong_settings(wrong, message):
    with pytest.raises(SvdtuneError, match=message):
        DyLoraConfig(**wrong)


def test_other_layers_are_refused():
    with pytest.raises(SvdtuneError, match=r"DyLoRA adapts Linear and Conv1D; '0' is a Embedding"):
        get_peft_model(nn.Sequential(nn.Embedding(4, 3)), DyLoraConfig(target_modules=["0"]))


def test_nothing_is_drawn_any_more_for_an_unloaded_model():
    model = adapted().train()
    state = torch.random.get_rng_state()
    base = model.unload().train()
    base(X)
    assert torch.equal(torch.random.get_rng_state(), state)
