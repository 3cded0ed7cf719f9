"""Reload identity and base identity over method × dtype × layer kind × model family, bit for
bit."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from test_model_families import FAMILIES, model_of, output
from test_peft_verbs import CONFIGS, UNCHANGED_AT_START, move
from test_slices import MODELS as FUSED_MODELS
from test_slices import fused_name
from test_slices import model_of as fused_model_of
from torch import nn

from pairwise import all_pairs
from tiny import EXPERTS, tiny_experts

METHODS = ["sara", "mosara", "sorsa"]
VARIANTS = ["sara-spectral", "mosara-one-head", "mosara-front"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# One of each kind of layer: Linear, Conv1D, slices in a row and by head, Conv2d, Conv1d and groups,
# all of them in a UNet.
KINDS = ["llama", "gpt2-whole", "gpt2", "gpt_neox", "convolutions", "unet"]


class Convolutions(nn.Module):
    """Conv1d, grouped, strided and dilated."""

    def __init__(self):
        super().__init__()
        self.one = nn.Conv1d(3, 8, 3, stride=2)
        self.groups = nn.Conv1d(8, 8, 3, groups=2, padding=1)
        self.wide = nn.Conv2d(1, 5, 3, dilation=2)

    def forward(self, x):
        y = torch.tanh(self.groups(torch.tanh(self.one(x))))
        return self.wide(y[:, None])


def build(kind: str, dtype: torch.dtype):
    """A model, what runs it, and the settings that adapt it."""
    if kind == "convolutions":
        torch.manual_seed(0)
        x = torch.linspace(-2, 2, 2 * 3 * 40).view(2, 3, 40).sin().to(dtype)
        settings = {"target_modules": ["one", "groups", "wide"], "rank_pattern": {".*": 2}}
        return Convolutions().to(dtype).eval(), lambda model: model(x), settings
    if kind in EXPERTS:
        settings = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"], "target_modules": ["q_proj"]}
        tokens = FAMILIES["llama"].inputs
        return tiny_experts(kind).to(dtype), lambda model: model(**tokens).logits, settings
    if kind in FUSED_MODELS and kind not in FAMILIES:
        name = fused_name(kind)
        settings = {"target_modules": [name], "fused_slices": {name: ["q", "v"]}}
        tokens = FAMILIES["llama"].inputs
        return fused_model_of(kind, dtype), lambda model: model(**tokens).logits, settings
    name = kind.removesuffix("-whole")
    family = FAMILIES[name]
    settings = {"target_modules": family.targets, "fused_slices": None if name != kind else family.slices}
    if name == "unet":
        settings["rank_pattern"] = {"conv_out": 2}
    inputs = {key: x.to(dtype) if x.is_floating_point() else x for key, x in family.inputs.items()}

    def run(model):
        original, FAMILIES[name] = FAMILIES[name], family._replace(inputs=inputs)
        try:
            return output(model, name)
        finally:
            FAMILIES[name] = original

    return model_of(name).to(dtype), run, settings


def adapted(kind: str, name: str, dtype: torch.dtype):
    model, run, settings = build(kind, dtype)
    cls, own = CONFIGS[name]
    small = {"r": 3} if own.get("r", 0) > 3 else {}
    return get_peft_model(model, cls(**(own | small | settings))).eval(), run


@torch.no_grad()
def check(kind: str, name: str, dtype: torch.dtype, folder) -> None:
    base, run, _ = build(kind, dtype)
    want = run(base)
    weights = {key: value.clone() for key, value in base.state_dict().items()}
    model, _ = adapted(kind, name, dtype)
    if name in UNCHANGED_AT_START:
        assert torch.equal(run(model), want)
    move(model, 0.1)
    after = run(model)
    assert torch.isfinite(after.float()).all()
    assert not torch.equal(after, want)

    model.save_pretrained(folder)
    for low_cpu_mem_usage in (False, True):
        loaded = PeftModel.from_pretrained(build(kind, dtype)[0], folder, low_cpu_mem_usage=low_cpu_mem_usage).eval()
        assert torch.equal(run(loaded), after)

    with model.disable_adapter():
        assert torch.equal(run(model), want)
    assert torch.equal(run(model), after)
    for key, value in model.unload().state_dict().items():
        assert torch.equal(value, weights[key]), key


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize(("name", "kind", "dtype"), all_pairs(METHODS, KINDS, DTYPES), ids=str)
def test_every_kind_of_layer(name, kind, dtype, tmp_path):
    check(kind, name, dtype, tmp_path)


@pytest.mark.parametrize(("name", "kind", "dtype"), all_pairs(["sara", "sorsa"], EXPERTS, DTYPES), ids=str)
def test_fused_experts(name, kind, dtype, tmp_path):
    check(kind, name, dtype, tmp_path)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize(("name", "kind", "dtype"), all_pairs(VARIANTS, KINDS, DTYPES), ids=str)
def test_every_kind_of_layer_in_other_variants(name, kind, dtype, tmp_path):
    check(kind, name, dtype, tmp_path)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize(
    ("name", "kind", "dtype"), all_pairs(METHODS, sorted({*FAMILIES, *FUSED_MODELS} - set(KINDS)), DTYPES), ids=str
)
def test_every_family(name, kind, dtype, tmp_path):
    check(kind, name, dtype, tmp_path)
