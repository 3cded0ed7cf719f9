"""Every tensor of an adapter has a name of its method, and files of 0.1, whose frozen factors had
other names, still load."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from svdtune import MoSaraConfig, SaraConfig, SorsaConfig
from svdtune.export.source import attach_adapter
from svdtune.methods.files.adapter import read_adapter
from svdtune.methods.files.names import current_names
from tiny import tiny_gpt2, tiny_llama

LAYERS = ["q_proj", "down_proj"]
CONFIGS = {
    "sara": SaraConfig(r=4, target_modules=LAYERS),
    "mosara": MoSaraConfig(r=4, target_modules=LAYERS),
    "mosara-front": MoSaraConfig(r=4, v_position="front", target_modules=LAYERS),
    "sorsa": SorsaConfig(r=4, target_modules=LAYERS),
    "sorsa-dropout": SorsaConfig(r=4, dropout=0.1, target_modules=LAYERS),
}
OLD = {"sorsa_P0": "frozen_P0", "sorsa_V0": "frozen_V0", "mosara_U": "frozen_U", "mosara_V": "frozen_V"}


@pytest.mark.parametrize("name", CONFIGS)
def test_what_goes_by_the_prefix_sends_the_base_and_nothing_else(name: str) -> None:
    """As TRL sends a model to vLLM: all parameters without the tuner's prefix, as the base's."""
    base = dict(tiny_llama().named_parameters())
    model = get_peft_model(tiny_llama(), CONFIGS[name])
    sent = {
        key.removeprefix("base_model.model.").replace(".base_layer", ""): parameter
        for key, parameter in model.named_parameters()
        if model.prefix not in key
    }
    assert sent.keys() == base.keys()
    assert all(torch.equal(parameter, base[key]) for key, parameter in sent.items())
    own = {key for key in model.state_dict() if model.prefix in key}
    assert own == {f"{key}.default" for key in get_peft_model_state_dict(model)}
    assert not any(p.requires_grad for key, p in model.named_parameters() if model.prefix not in key)


def test_of_a_fused_layer_too() -> None:
    config = SorsaConfig(r=4, target_modules=["c_attn"], fused_slices={"c_attn": ["q", "v"]})
    model = get_peft_model(tiny_gpt2(), config)
    sent = [key for key, _ in model.named_parameters() if model.prefix not in key]
    assert len(sent) == len(dict(tiny_gpt2().named_parameters()))


def renamed_as_in_0_1(folder: Path) -> None:
    """Give an adapter's frozen tensors the names they had."""
    tensors = load_file(folder / "adapter_model.safetensors")
    for new, old in OLD.items():
        tensors = {key.replace(f".{new}", f".{old}"): tensor for key, tensor in tensors.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = json.loads((folder / "adapter_config.json").read_text())
    settings.pop("weights_sha256")
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    assert any("frozen_" in key for key in tensors)


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("name", ["mosara", "sorsa"])
def test_files_with_the_names_of_0_1_load_as_they_did(tmp_path: Path, name: str, compact: bool) -> None:
    config = type(CONFIGS[name])(r=4, compact=compact, target_modules=LAYERS)
    model = get_peft_model(tiny_llama(), config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    words = torch.arange(10)[None]
    expected = model(words).logits
    model.save_pretrained(tmp_path)
    before = read_adapter(tmp_path).layers
    renamed_as_in_0_1(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()(words).logits, expected)
    again = get_peft_model(tiny_llama(), config)
    again.load_adapter(tmp_path, "old")
    again.set_adapter("old")
    assert torch.equal(again.eval()(words).logits, expected)
    assert torch.equal(attach_adapter(tiny_llama(), tmp_path)(words).logits, expected)
    found = read_adapter(tmp_path).layers
    assert {layer: sorted(parts) for layer, parts in found.items()} == {k: sorted(v) for k, v in before.items()}


def test_other_names_stay() -> None:
    names = ["a.frozen_V0", "frozen_P0", "a.frozen_U_probe", "a.frozen_Vx", "frozen_U.weight", "a.lora_A.weight"]
    assert list(current_names(dict.fromkeys(names, torch.zeros(1)))) == [
        "a.sorsa_V0",
        "sorsa_P0",
        "a.mosara_U_probe",
        "a.frozen_Vx",
        "frozen_U.weight",
        "a.lora_A.weight",
    ]
