"""Parameters and stored names are matched as Transformers matches them when it loads a
checkpoint."""

import importlib

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

from svdtune.checkpoint import open_checkpoint
from tiny import tiny_gpt2, tiny_llama

_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
_TEXT = tf.LlamaConfig(**_SIZES, vocab_size=60)
_VISION = tf.CLIPVisionConfig(**_SIZES, image_size=8, patch_size=4)
MODELS = {
    "llama": tiny_llama,
    "gpt2": tiny_gpt2,
    "bert": lambda: tf.BertForSequenceClassification(tf.BertConfig(**_SIZES, vocab_size=60)),
    "llava": lambda: tf.LlavaForConditionalGeneration(tf.LlavaConfig(vision_config=_VISION, text_config=_TEXT)),
    "t5": lambda: tf.T5ForConditionalGeneration(
        tf.T5Config(d_model=32, d_ff=48, d_kv=8, num_heads=4, num_layers=2, vocab_size=60)
    ),
    "mixtral": lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**_SIZES, vocab_size=60, num_local_experts=2)),
}
# What older releases called a part of a name.
OLDER = {"bert": {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}}


def saved(model, folder, older=()):
    """The model as Transformers saves it, under older names."""
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    for new, old in dict(older).items():
        tensors = {name.replace(new, old): tensor for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("name", MODELS)
def test_what_is_read_is_what_transformers_loads(name, tmp_path):
    if name in ("bert", "llava"):  # renamed by a table that older releases do not have
        pytest.importorskip("transformers.core_model_loading")
    torch.manual_seed(0)
    model = MODELS[name]()
    folder = saved(model, tmp_path, OLDER.get(name, {}))
    loaded = dict(type(model).from_pretrained(folder).named_parameters(remove_duplicate=False))
    checkpoint = open_checkpoint(folder)
    assert type(checkpoint.model) is type(model)
    lacking = loaded.keys() - checkpoint.readers.keys()
    # Experts are stored one by one and loaded into one parameter: none of them is that parameter.
    assert all("experts" in parameter for parameter in lacking), lacking
    assert bool(lacking) == (name == "mixtral" and tf.__version__ >= "5")
    for parameter, reader in checkpoint.readers.items():
        assert torch.equal(reader(), loaded[parameter]), parameter


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_a_prefix_may_be_there_or_not(prefix, tmp_path):
    model = tiny_gpt2()
    model.transformer.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({prefix + name: tensor for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    for architecture in (None, "GPT2Model"):
        checkpoint = open_checkpoint(tmp_path, architecture=architecture)
        names = {name.removeprefix("transformer."): stored for name, stored in checkpoint.names.own.items()}
        assert names == {name: prefix + name for name in tensors}
    assert type(checkpoint.model) is tf.GPT2Model


def test_tied_parameters_have_one_place(tmp_path):
    tiny_gpt2().save_pretrained(tmp_path)
    names = open_checkpoint(tmp_path).names
    both = ["transformer.wte.weight", "lm_head.weight"]
    assert names.groups[both[0]] == names.groups[both[1]] == both
    assert names.of(both[0]) == names.of(both[1]) == both[0]
    assert both[1] not in names.own
    assert names.of("transformer.nowhere.weight") is None


def test_a_name_that_stands_for_another_parameter_in_an_older_checkpoint(tmp_path, monkeypatch):
    """As in Kimi's vision tower, where an older norm0 is norm1 now, and an older norm1 is norm2."""
    loading = pytest.importorskip("transformers.core_model_loading")

    def mapping(*_, **__):
        names = [r"mlp\.base_proj", r"mlp\.gate_proj"], [r"mlp.gate_proj", r"mlp.up_proj"]
        return [loading.GroupWeightRename(*names)]

    folder = saved(tiny_llama(), tmp_path, {"gate_proj": "base_proj", "up_proj": "gate_proj"})
    for module in ("conversion_mapping", "modeling_utils"):
        found = importlib.import_module(f"transformers.{module}")
        monkeypatch.setattr(found, "get_model_conversion_mapping", mapping)
    loaded = tf.LlamaForCausalLM.from_pretrained(folder)
    checkpoint = open_checkpoint(folder)
    for name in ("gate_proj", "up_proj"):
        weight = loaded.model.layers[1].mlp.get_submodule(name).weight
        assert torch.equal(checkpoint.weight(f"model.layers.1.mlp.{name}"), weight)
    assert checkpoint.names.own["model.layers.1.mlp.up_proj.weight"] == "model.layers.1.mlp.gate_proj.weight"
