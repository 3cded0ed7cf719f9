"""Every loader finds a saved adapter: PEFT's, and Transformers' three doors, with the same checks
and the same outputs to the bit."""

import json
import shutil

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, pipeline

from svdtune import MoSaraConfig, SaraConfig, SorsaConfig, SvdtuneError
from tiny import tiny_llama

pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config`")

TOKENS = torch.arange(1, 25).view(2, 12)
TARGETS = {"target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
CONFIGS = {
    "sara": SaraConfig(r=3, **TARGETS),
    "mosara": MoSaraConfig(r=3, **TARGETS),
    "sorsa": SorsaConfig(r=3, **TARGETS),
    "compact": SorsaConfig(r=3, compact=True, **TARGETS),
    "whole modules": SorsaConfig(r=3, modules_to_save=["norm"], **TARGETS),
}


def in_place(folder, adapter):
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.load_adapter(str(adapter))
    return model


def beside_another(folder, adapter):
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.load_adapter(str(adapter), "first")
    model.load_adapter(str(adapter), "second")
    for module in model.modules():
        if isinstance(module, BaseTunerLayer | ModulesToSaveWrapper):
            module.set_adapter("second")
    return model


DOORS = {
    "PeftModel": lambda base, adapter: PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter),
    "AutoPeftModel": lambda base, adapter: AutoPeftModelForCausalLM.from_pretrained(adapter),
    "load_adapter": in_place,
    "load_adapter twice": beside_another,
    "from_pretrained": lambda base, adapter: AutoModelForCausalLM.from_pretrained(adapter),
    "pipeline": lambda base, adapter: pipeline("text-generation", model=str(adapter), tokenizer=str(base)).model,
}


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=TOKENS).logits


@pytest.fixture
def saved(request, tmp_path, tiny_folder):
    """A trained adapter's folder, with what its model gives."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_folder), CONFIGS[request.param])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path)
    return tmp_path, logits(model)


def every_method(function):
    return pytest.mark.parametrize("saved", CONFIGS, indirect=True)(function)


@pytest.mark.parametrize("door", DOORS)
@every_method
def test_gives_what_was_saved(saved, tiny_folder, door):
    adapter, expected = saved
    assert torch.equal(logits(DOORS[door](tiny_folder, adapter)), expected)


@pytest.mark.parametrize("saved", ["sorsa"], indirect=True)
def test_tensors_without_a_file(saved, tiny_folder):
    adapter, expected = saved
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    tensors = load_file(adapter / "adapter_model.safetensors")
    model.load_adapter(peft_config=SorsaConfig.from_pretrained(adapter), adapter_state_dict=tensors)
    assert torch.equal(logits(model), expected)


def lacks_a_tensor(adapter):
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors.pop(min(tensors))
    save_file(tensors, adapter / "adapter_model.safetensors")
    config = adapter / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"weights_sha256": None}))


def is_cut_short(adapter):
    path = adapter / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])


@pytest.mark.parametrize("harm", [is_cut_short, lacks_a_tensor])
@pytest.mark.parametrize("saved", ["sara", "mosara", "sorsa"], indirect=True)
def test_a_damaged_file_is_refused_and_the_model_stays(saved, tiny_folder, tmp_path, harm):
    adapter, expected = saved
    bad = tmp_path / "bad"
    shutil.copytree(adapter, bad)
    harm(bad)
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    alone, trained = logits(model), [name for name, p in model.named_parameters() if p.requires_grad]
    for _ in range(2):
        with pytest.raises(SvdtuneError, match=r"the adapter's file lacks|is cut short or damaged"):
            model.load_adapter(str(bad))
    assert torch.equal(logits(model), alone)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == trained
    assert not any(isinstance(module, BaseTunerLayer) for module in model.modules())
    model.load_adapter(str(adapter))
    assert torch.equal(logits(model), expected)
    with pytest.raises(SvdtuneError, match=r"the adapter's file lacks|is cut short or damaged"):
        model.load_adapter(str(bad), "second")
    assert list(model.peft_config) == ["default"]
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("saved", ["sorsa"], indirect=True)
def test_another_base_is_refused(saved):
    model = tiny_llama(vocab_size=258, num_key_value_heads=2)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.mul_(2)
    with pytest.raises(SvdtuneError, match="made from another base model"):
        model.load_adapter(str(saved[0]))
    with pytest.raises(SvdtuneError, match="made from another base model"):  # not "already exists"
        model.load_adapter(str(saved[0]))
