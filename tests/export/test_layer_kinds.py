"""Convolutions and slices of fused projections exported to LoRA: stock PEFT gives the same
outputs."""

import copy

import pytest
import torch
import transformers as tf
from peft import PeftModel, get_peft_model
from torch import nn

from pairwise import all_pairs
from svdtune import MoSaraConfig, SaraConfig, SorsaConfig, SvdtuneError
from svdtune.export.layerwise import LayerwiseAdapter
from svdtune.export.lora import combine, export_lora
from svdtune.methods.files.adapter import read_config
from tiny import moved

METHODS = {
    "sara": SaraConfig(r=3),
    "mosara": MoSaraConfig(r=4, num_heads=1),
    "sorsa": SorsaConfig(r=2),
}
TOKENS = torch.arange(1, 25).view(2, 12)
_ENDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 60}
FUSED = {
    "gpt2": (
        lambda: tf.GPT2LMHeadModel(tf.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=60, **_ENDS)),
        "c_attn",
    ),
    "phi3": (
        lambda: tf.Phi3ForCausalLM(tf.Phi3Config(**_SIZES, **_ENDS, num_key_value_heads=2, intermediate_size=48)),
        "qkv_proj",
    ),
    "gpt_neox": (
        lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**_SIZES, **_ENDS, intermediate_size=64)),
        "query_key_value",
    ),
}


class Convolutions(nn.Module):
    """One of each kind, each of another size."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.two = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.groups = nn.Conv2d(8, 12, (3, 2), groups=4)
        self.point = nn.Conv2d(12, 6, 1)
        self.one = nn.Conv1d(6, 10, 3, padding=1)

    def forward(self, x):
        return self.one(torch.tanh(self.point(torch.tanh(self.groups(torch.tanh(self.two(x)))))).flatten(2))


def trained(model, config):
    return moved(get_peft_model(model, copy.deepcopy(config)).eval())


def fused(kind: str):
    torch.manual_seed(0)
    return FUSED[kind][0]().eval()


@torch.no_grad()
def logits(model):
    return model(input_ids=TOKENS).logits


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups > 1")
@pytest.mark.parametrize("name", METHODS)
def test_convolutions(name, tmp_path):
    x = torch.randn(2, 3, 14, 12)
    targets = ["two", "groups", "point", "one"]
    model = trained(Convolutions(), type(METHODS[name])(**own(METHODS[name]), target_modules=targets))
    model.save_pretrained(tmp_path / "adapter")
    report = export_lora(tmp_path / "adapter", tmp_path / "lora")
    loaded = PeftModel.from_pretrained(Convolutions(), tmp_path / "lora").eval()
    assert torch.allclose(loaded(x), model(x), atol=1e-5)
    assert not torch.allclose(loaded(x), Convolutions()(x), atol=1e-3)
    assert report.ranks["groups"] == 4 * report.ranks["one"]


def own(config) -> dict:
    return {key: getattr(config, key) for key in ("r", "num_heads", "layout") if hasattr(config, key)}


@pytest.mark.parametrize("settings", [{"dilation": 2}, {"padding": 1, "padding_mode": "reflect"}])
def test_what_pefts_lora_cannot_compute_is_refused(settings, tmp_path):
    model = trained(nn.Sequential(nn.Conv2d(3, 4, 2, **settings)), SaraConfig(r=2, target_modules=["0"]))
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(SvdtuneError, match=r"'0' is a convolution with dilation .* padding mode"):
        export_lora(tmp_path / "adapter", tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")
@pytest.mark.parametrize(("name", "kind", "bias"), all_pairs(METHODS, FUSED, ["none", "all"]))
def test_slices(name, kind, bias, tmp_path):
    target = FUSED[kind][1]
    settings = {"target_modules": [target], "fused_slices": {target: ["q", "v"]}, "rank_pattern": {rf"{target}\.v": 5}}
    config = type(METHODS[name])(**own(METHODS[name]) | settings, bias=bias, task_type="CAUSAL_LM")
    model = trained(fused(kind), config)
    model.save_pretrained(tmp_path / "adapter")
    report = export_lora(tmp_path / "adapter", tmp_path / "lora")
    assert set(report.ranks.values()) == {(METHODS[name].r + 5) * (1 if name in ("sara", "mosara") else 2)}
    loaded = PeftModel.from_pretrained(fused(kind), tmp_path / "lora").eval()
    assert torch.allclose(logits(loaded), logits(model), atol=1e-4)
    assert not torch.allclose(logits(loaded), logits(fused(kind)), atol=1e-3)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")
def test_adapters_of_slices_and_of_the_whole_are_combined(tmp_path):
    parts = {"slices": SorsaConfig(r=2, fused_slices="auto"), "whole": SaraConfig(r=3)}
    deltas = {}
    for name, config in parts.items():
        config.task_type = "CAUSAL_LM"
        model = trained(fused("gpt2"), config)
        model.save_pretrained(tmp_path / name)
        deltas[name] = {key: value.clone() for key, value in model.merge_and_unload().state_dict().items()}
    combine({tmp_path / "slices": 0.7, tmp_path / "whole": -0.4}, tmp_path / "lora")
    base = fused("gpt2").state_dict()
    got = PeftModel.from_pretrained(fused("gpt2"), tmp_path / "lora").merge_and_unload().state_dict()
    for key, weight in base.items():
        want = weight + 0.7 * (deltas["slices"][key] - weight) - 0.4 * (deltas["whole"][key] - weight)
        assert torch.allclose(got[key], want, atol=1e-5), key


@pytest.mark.parametrize("name", METHODS)
def test_merging_from_disk(name, tmp_path):
    """One layer at a time, as `svdtune merge` does it."""
    convolutions = {"target_modules": ["two", "groups", "point", "one"]}
    for base, settings in ((fused("gpt2"), {"fused_slices": "auto"}), (Convolutions().eval(), convolutions)):
        weights = {key: value.clone() for key, value in base.state_dict().items()}
        skeleton = copy.deepcopy(base).to("meta")
        model = trained(base, type(METHODS[name])(**own(METHODS[name]) | settings))
        folder = tmp_path / type(base).__name__
        model.save_pretrained(folder)
        adapter = LayerwiseAdapter(folder, read_config(folder), skeleton)
        merged = model.merge_and_unload().state_dict()
        assert adapter.layers
        for layer in adapter.layers:
            got = adapter.merged(layer, weights[f"{layer}.weight"].clone())
            assert torch.allclose(got, merged[f"{layer}.weight"], atol=1e-6)
            assert not torch.allclose(got, weights[f"{layer}.weight"], atol=1e-3)
