"""What an adapter's files may hold: the names that its configuration implies, each once, and
numbers."""

import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from svdtune import MoSaraConfig, SaraConfig, SorsaConfig, SvdtuneError
from tiny import tiny_llama as base

TARGETS = {"target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
CONFIGS = [SaraConfig(r=3, **TARGETS), MoSaraConfig(r=3, **TARGETS), SorsaConfig(r=3, bias="sorsa_only", **TARGETS)]
LAYER = "base_model.model.model.layers.0."


@pytest.fixture(params=CONFIGS, ids=lambda config: config.method)
def folder(request, tmp_path):
    get_peft_model(base(attention_bias=True), request.param).save_pretrained(tmp_path)
    return tmp_path


def change(folder, tensors):
    """Put tensors into an adapter's file, with no digest to tell."""
    found = load_file(folder / "adapter_model.safetensors")
    save_file(found | tensors, folder / "adapter_model.safetensors")
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(settings | {"weights_sha256": None}))


def by_peft(folder, model):
    PeftModel.from_pretrained(model, folder)


def by_transformers(folder, model):
    model.load_adapter(str(folder))


FOREIGN = {
    "a norm": ("base_model.model.model.norm.weight", [32]),
    "a bare name": ("model.norm.weight", [32]),
    "a layer that is not adapted": (LAYER + "mlp.up_proj.weight", [48, 32]),
    "the adapted layer's own": (LAYER + "mlp.down_proj.base_layer.weight", [32, 48]),
    "the same before it was adapted": (LAYER + "mlp.down_proj.weight", [32, 48]),
    "embeddings": ("base_model.model.model.embed_tokens.weight", [60, 32]),
    "the head": ("base_model.model.lm_head.weight", [60, 32]),
    "a bias of another layer": (LAYER + "self_attn.k_proj.bias", [32]),
    "an adapter's name": (LAYER + "self_attn.k_proj.sorsa_U", [32, 3]),
    "nobody's": ("anything", [1]),
}


@pytest.mark.parametrize("load", [by_peft, by_transformers])
@pytest.mark.parametrize("kind", FOREIGN)
def test_other_names_are_refused(folder, kind, load):
    name, shape = FOREIGN[kind]
    change(folder, {name: torch.full(shape, 7.0)})
    model = base(attention_bias=True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(SvdtuneError, match=r"which its configuration does not ask for .*modules_to_save or bias"):
        load(folder, model)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_another_kind_or_shape(folder):
    first = sorted(load_file(folder / "adapter_model.safetensors").items())[0]
    change(folder, {first[0]: first[1].to(torch.int8)})
    with pytest.raises(SvdtuneError, match=r"is stored as int8; expected float32, .* Save the adapter again"):
        by_peft(folder, base(attention_bias=True))


def test_a_bias_of_another_shape(tmp_path):
    get_peft_model(base(attention_bias=True), CONFIGS[2]).save_pretrained(tmp_path)
    change(tmp_path, {LAYER + "self_attn.q_proj.base_layer.bias": torch.ones(7)})
    with pytest.raises(SvdtuneError, match=r"bias is \[7\], but this model needs \[32\]"):
        by_peft(tmp_path, base(attention_bias=True))


def test_resized_embeddings_are_loaded(tmp_path):
    base().save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model.resize_token_embeddings(70)
    model = get_peft_model(model, SorsaConfig(r=3, **TARGETS))
    with torch.no_grad():
        model.get_input_embeddings().weight[60:] = 3.0
    with pytest.warns(UserWarning, match="save_embedding_layers"):
        model.save_pretrained(tmp_path / "adapter")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    again.resize_token_embeddings(70)
    again = PeftModel.from_pretrained(again, tmp_path / "adapter")
    assert torch.equal(again.get_input_embeddings().weight, model.get_input_embeddings().weight)


@pytest.mark.parametrize("load", [by_peft, by_transformers])
def test_a_key_twice_in_the_configuration(folder, load):
    path = folder / "adapter_config.json"
    path.write_text(path.read_text().rstrip().rstrip("}") + ', "weights_sha256": null}')
    with pytest.raises(SvdtuneError, match="the key 'weights_sha256' stands there twice"):
        load(folder, base(attention_bias=True))


@pytest.mark.parametrize("load", [by_peft, by_transformers])
def test_fingerprints_of_no_layer(folder, load):
    path = folder / "adapter_config.json"
    settings = json.loads(path.read_text())
    settings["base_fingerprint"] = {f"x.{name}": value for name, value in settings["base_fingerprint"].items()}
    path.write_text(json.dumps(settings))
    with pytest.raises(SvdtuneError, match=r"names layer 'x.model.* which the adapter does not have"):
        load(folder, base(attention_bias=True))


class TestNoNumbers:
    def test_saving_fails_unless_asked(self, folder, tmp_path, monkeypatch):
        model = PeftModel.from_pretrained(base(attention_bias=True), folder, is_trainable=True)
        next(p for p in model.parameters() if p.requires_grad).data.view(-1)[0] = torch.nan
        with pytest.raises(SvdtuneError, match=r"is not saved: its model.* holds NaN or infinity.*lower learning rate"):
            model.save_pretrained(tmp_path / "bad")
        assert not (tmp_path / "bad" / "adapter_model.safetensors").exists()
        monkeypatch.setenv("SVDTUNE_FINITE_CHECK", "off")
        model.save_pretrained(tmp_path / "bad")
        PeftModel.from_pretrained(base(attention_bias=True), tmp_path / "bad")

    @pytest.mark.parametrize("load", [by_peft, by_transformers])
    @pytest.mark.parametrize("value", [torch.nan, torch.inf])
    def test_loading_refuses(self, folder, load, value):
        name, tensor = sorted(load_file(folder / "adapter_model.safetensors").items())[0]
        change(folder, {name: torch.full_like(tensor, value)})
        with pytest.raises(SvdtuneError, match=r"is not loaded: its model.* holds NaN or infinity"):
            load(folder, base(attention_bias=True))
