"""What is loaded is what was saved, onto the base it was made from; anything else is one clear
error and leaves the model."""

import json
import shutil

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from svdtune import MoSaraConfig, SaraConfig, SorsaConfig, SvdtuneError
from tiny import tiny_llama as base

CONFIGS = {
    "sara": (SaraConfig, {"threshold": 0.2}),
    "mosara": (MoSaraConfig, {"r": 5, "num_heads": 2}),
    "sorsa": (SorsaConfig, {"r": 4}),
}
TOKENS = torch.arange(1, 25).view(2, 12)


def save(name, folder):
    cls, settings = CONFIGS[name]
    model = get_peft_model(base(), cls(**settings, task_type="CAUSAL_LM")).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return model


@torch.no_grad()
def logits(model):
    return model(input_ids=TOKENS).logits


def refused(model, folder, match, **settings):
    """Loading fails with the message, and the model is as it was: layers, weights, gradients and
    outputs."""
    layers = [type(module) for module in model.modules()]
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    trained = [p.requires_grad for p in model.parameters()]
    before = logits(model)
    with pytest.raises(SvdtuneError, match=match):
        PeftModel.from_pretrained(model, folder, **settings)
    assert [type(module) for module in model.modules()] == layers
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == trained
    assert torch.equal(logits(model), before)
    assert not hasattr(model, "peft_config")


def rewrite(folder, change, keep_digest=False):
    """Change an adapter's tensors; without its digest the file stands for one that was saved so."""
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    if not keep_digest:
        edit_config(folder, weights_sha256=None)


def edit_config(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("name", CONFIGS)
class TestTheBase:
    def test_another_base_is_refused_by_the_first_layer_that_differs(self, name, tmp_path):
        save(name, tmp_path)
        other = base()
        other.model.layers[1].self_attn.q_proj.weight.data[3, 4] += 0.5
        refused(other, tmp_path, "the weight of 'model.layers.1.self_attn.q_proj' differs")
        refused(other, tmp_path, "the weight of 'model.layers.1.self_attn.q_proj' differs", low_cpu_mem_usage=True)

    def test_the_override(self, name, tmp_path, monkeypatch):
        save(name, tmp_path)
        config = CONFIGS[name][0].from_pretrained(tmp_path)
        config.base_fingerprint = {}
        other = base()
        other.model.layers[1].self_attn.q_proj.weight.data[3, 4] += 0.5
        assert torch.isfinite(logits(PeftModel.from_pretrained(other, tmp_path, config=config))).all()
        other = base()
        other.model.layers[1].self_attn.q_proj.weight.data[3, 4] += 0.5
        monkeypatch.setenv("SVDTUNE_BASE_CHECK", "off")
        assert torch.isfinite(logits(PeftModel.from_pretrained(other, tmp_path))).all()

    def test_copies_in_bf16_are_the_same_base(self, name, tmp_path):
        save(name, tmp_path)
        for same in (base().bfloat16(), base().bfloat16().float()):
            assert torch.isfinite(logits(PeftModel.from_pretrained(same, tmp_path))).all()

    def test_layers_that_are_not_adapted_may_differ(self, name, tmp_path):
        model = save(name, tmp_path)
        other = base()
        other.lm_head.weight.data += 1
        got = logits(PeftModel.from_pretrained(other, tmp_path).eval())
        assert not torch.allclose(got, logits(model))

    def test_a_second_adapter_made_from_the_same_base(self, name, tmp_path):
        model = save(name, tmp_path)
        model.add_adapter("fresh", CONFIGS[name][0](**CONFIGS[name][1]))
        model.load_adapter(tmp_path, "again")
        model.set_adapter("again")
        got = logits(model)
        model.set_adapter("default")
        assert torch.allclose(got, logits(model), atol=1e-5)

    def test_fewer_or_smaller_layers(self, name, tmp_path):
        save(name, tmp_path)
        refused(base(num_hidden_layers=1), tmp_path, r"has no layer 'model\.layers\.1\.\S+' to adapt")
        edit_config(tmp_path, base_fingerprint={})
        refused(base(intermediate_size=56, hidden_size=40), tmp_path, r"made for a model of another size, or its file")


@pytest.mark.parametrize("name", CONFIGS)
class TestTheFile:
    def test_cut_short(self, name, tmp_path):
        save(name, tmp_path)
        path = tmp_path / "adapter_model.safetensors"
        path.write_bytes(path.read_bytes()[:-100])
        refused(base(), tmp_path, r"adapter_model\.safetensors is cut short or damaged")

    def test_altered(self, name, tmp_path):
        save(name, tmp_path)
        path = tmp_path / "adapter_model.safetensors"
        data = bytearray(path.read_bytes())
        data[-3] ^= 1
        path.write_bytes(data)
        refused(base(), tmp_path, "is not the file that was saved with this adapter")

    def test_a_tensor_is_missing(self, name, tmp_path):
        save(name, tmp_path)
        rewrite(tmp_path, lambda tensors: tensors.pop(next(iter(tensors))))
        refused(base(), tmp_path, "the adapter's file lacks")
        refused(base(), tmp_path, "the adapter's file lacks", low_cpu_mem_usage=True)

    def test_a_failed_second_adapter_leaves_the_first(self, name, tmp_path):
        model = save(name, tmp_path / "good")
        shutil.copytree(tmp_path / "good", tmp_path / "bad")
        rewrite(tmp_path / "bad", lambda tensors: tensors.pop(next(iter(tensors))))
        before = logits(model)
        with pytest.raises(SvdtuneError, match="the adapter's file lacks"):
            model.load_adapter(tmp_path / "bad", "second")
        assert list(model.peft_config) == ["default"]
        assert torch.equal(logits(model), before)

    def test_missing(self, name, tmp_path):
        save(name, tmp_path)
        (tmp_path / "adapter_model.safetensors").unlink()
        refused(base(), tmp_path, r"has no adapter_model\.safetensors; copy the whole folder")

    def test_a_setting_of_a_later_version(self, name, tmp_path):
        save(name, tmp_path)
        edit_config(tmp_path, entanglement=3, svdtune_version="99.0")
        refused(base(), tmp_path, r"does not know \(\['entanglement'\]\); it was saved by svdtune 99\.0\. Upgrade")


def test_pickles_are_refused(tmp_path):
    model = save("sorsa", tmp_path)
    with pytest.raises(SvdtuneError, match=r"writes a pickle, which svdtune never loads.*saved as safetensors"):
        model.save_pretrained(tmp_path / "not", safe_serialization=False)
    assert not (tmp_path / "not").exists()
    torch.save(load_file(tmp_path / "adapter_model.safetensors"), tmp_path / "adapter_model.bin")
    (tmp_path / "adapter_model.safetensors").unlink()
    refused(base(), tmp_path, "is a pickle, which can run code")


def test_auto_classes_check_too(tmp_path):
    base().save_pretrained(tmp_path / "base")
    model = get_peft_model(LlamaForCausalLM.from_pretrained(tmp_path / "base"), SorsaConfig(r=4, task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path / "adapter")
    other = base()
    other.model.layers[0].self_attn.q_proj.weight.data[0] += 1
    other.save_pretrained(tmp_path / "base")
    with pytest.raises(SvdtuneError, match=r"the weight of 'model\.layers\.0\.self_attn\.q_proj' differs"):
        AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")


def test_every_adapted_layer_has_a_fingerprint():
    config = get_peft_model(base(), SorsaConfig(r=4)).peft_config["default"]
    assert set(config.base_fingerprint) == set(config.ranks)
    assert len(set(config.base_fingerprint.values())) == len(config.ranks)


def test_adapted_layers_are_gone_after_a_refusal(tmp_path):
    save("sorsa", tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.pop(next(iter(tensors))))
    model = base()
    refused(model, tmp_path, "lacks")
    assert not any(isinstance(module, BaseTunerLayer) for module in model.modules())
    edit_config(tmp_path, ranks={})
    assert get_peft_model(model, SorsaConfig(r=4)) is not None
