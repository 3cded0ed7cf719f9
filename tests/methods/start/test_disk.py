"""An adapter started layer by layer from a checkpoint is the one that get_peft_model starts, bit
for bit."""

import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import GPT2LMHeadModel, LlamaForCausalLM

from svdtune import MoSaraConfig, SaraConfig, SorsaConfig
from svdtune.checkpoint import Checkpoint, open_checkpoint, open_shape
from svdtune.errors import SvdtuneError
from svdtune.methods.start.disk import start
from tiny import tiny_gpt2, tiny_llama
from watched import Watched

QV = ["q_proj", "v_proj"]
WRITTEN_BY_PEFT = ("base_model_name_or_path", "weights_sha256")


@pytest.fixture
def folder(tmp_path):
    model = tiny_llama(num_hidden_layers=3, num_key_value_heads=2, vocab_size=64).bfloat16()
    model.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    return tmp_path / "base"


CASES = {
    "sara": lambda: SaraConfig(r=3, target_modules=QV, task_type="CAUSAL_LM"),
    "sara by threshold": lambda: SaraConfig(threshold=0.3, target_modules=QV, init="zero_v"),
    "sara from the spectrum": lambda: SaraConfig(threshold=0.2, target_modules="all-linear", init="spectral"),
    "mosara": lambda: MoSaraConfig(threshold=0.5, num_heads=3, target_modules=QV, task_type="CAUSAL_LM"),
    "mosara in front": lambda: MoSaraConfig(r=5, v_position="front", target_modules=["up_proj", "down_proj"]),
    "sorsa": lambda: SorsaConfig(r=7, target_modules="all-linear", exclude_modules=["o_proj"]),
    "sorsa by threshold": lambda: SorsaConfig(threshold=0.4, target_modules=QV, rank_pattern={"layers.1.*q_proj": 1}),
    "some layers": lambda: SorsaConfig(r=4, target_modules=QV, layers_to_transform=[0, 2]),
    "compact": lambda: SorsaConfig(r=5, compact=True, target_modules=QV),
    "compact by threshold": lambda: MoSaraConfig(threshold=0.5, compact=True, target_modules=QV),
    "last by threshold": lambda: SorsaConfig(threshold=0.3, components="last", target_modules=QV),
    "a band": lambda: SorsaConfig(components=(2, 6), target_modules=QV),
    "compact in the middle": lambda: SorsaConfig(r=4, components="middle", compact=True, target_modules=QV),
    "at random": lambda: SorsaConfig(r=3, init_weights=False, target_modules=QV),
}


def started(model, config, folder):
    """(tensors, configuration) as get_peft_model and save_pretrained write them."""
    torch.manual_seed(7)
    get_peft_model(model, config).save_pretrained(folder)
    return load_file(folder / "adapter_model.safetensors"), json.loads((folder / "adapter_config.json").read_text())


@pytest.mark.parametrize("case", CASES)
def test_it_is_what_get_peft_model_starts(folder, tmp_path, case):
    tensors, config = started(LlamaForCausalLM.from_pretrained(folder), CASES[case](), tmp_path / "whole")
    torch.manual_seed(7)
    checkpoint = open_checkpoint(folder)
    made = start(checkpoint, CASES[case](), tmp_path / "streamed")
    found = load_file(made.adapter / "adapter_model.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name
    written = json.loads((made.adapter / "adapter_config.json").read_text())
    for key in WRITTEN_BY_PEFT:
        config.pop(key), written.pop(key)
    config["target_modules"], written["target_modules"] = (
        sorted(config["target_modules"]),
        sorted(written["target_modules"]),
    )
    assert written == config
    assert made.ranks == config["ranks"]
    assert all(parameter.is_meta for parameter in checkpoint.model.parameters())
    assert not any("sorsa" in name for name, _ in checkpoint.model.named_modules())


@pytest.mark.parametrize("case", ["sara", "mosara", "sorsa by threshold", "some layers", "compact"])
def test_it_loads_and_computes_the_same(folder, tmp_path, case):
    torch.manual_seed(7)
    whole = get_peft_model(LlamaForCausalLM.from_pretrained(folder), CASES[case]()).eval()
    torch.manual_seed(7)
    made = start(open_checkpoint(folder), CASES[case](), tmp_path / "adapter")
    base = LlamaForCausalLM.from_pretrained(folder)
    loaded = PeftModel.from_pretrained(base, made.adapter, is_trainable=True).eval()
    tokens = torch.arange(12)[None]
    assert torch.equal(loaded(tokens).logits, whole(tokens).logits)
    trained = {name: parameter.shape for name, parameter in whole.named_parameters() if parameter.requires_grad}
    assert {name: p.shape for name, p in loaded.named_parameters() if p.requires_grad} == trained
    assert made.trained == sum(shape.numel() for shape in trained.values())


@pytest.mark.parametrize("slices", ["auto", {"c_attn": ["q", "v"]}])
def test_slices_and_transposed_weights(tmp_path, slices):
    tiny_gpt2().save_pretrained(tmp_path / "base")

    def method():
        return MoSaraConfig(threshold=0.4, target_modules=["c_attn", "c_proj"], fused_slices=slices)

    tensors, expected = started(GPT2LMHeadModel.from_pretrained(tmp_path / "base"), method(), tmp_path / "whole")
    torch.manual_seed(7)
    made = start(open_checkpoint(tmp_path / "base"), method(), tmp_path / "streamed")
    found = load_file(made.adapter / "adapter_model.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    written = json.loads((made.adapter / "adapter_config.json").read_text())
    assert written["slices"] == expected["slices"]
    assert written["base_fingerprint"] == expected["base_fingerprint"]
    PeftModel.from_pretrained(GPT2LMHeadModel.from_pretrained(tmp_path / "base"), made.adapter)


def test_a_shape_has_nothing_to_start_from(tmp_path):
    shape = open_shape("llama-7b", layers=1)
    with pytest.raises(SvdtuneError, match="llama-7b is a shape without weights, which are read here"):
        start(shape, SorsaConfig(r=2, target_modules=["q_proj"]), tmp_path / "adapter")


def test_one_weight_is_there_at_a_time(folder, tmp_path):
    """The weight before is gone whenever the next is read."""
    watched = Watched(open_checkpoint(folder))
    start(watched.checkpoint, SorsaConfig(r=2, target_modules=QV), tmp_path / "adapter")
    assert watched.read == 6
    assert watched.most == 0


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lambda: SorsaConfig(r=2, target_modules=QV, modules_to_save=["lm_head"]), "modules_to_save"),
        (lambda: SorsaConfig(r=2, target_modules=QV, bias="all"), "bias"),
        (lambda: SorsaConfig(r=2, target_modules=QV, initialized=True), "that was saved"),
        (lambda: SorsaConfig(r=17, target_modules=QV), "r = 17 is larger"),
    ],
)
def test_what_cannot_be_started_is_refused_before_anything_is_written(folder, tmp_path, config, message):
    with pytest.raises(SvdtuneError, match=message):
        start(open_checkpoint(folder), config(), tmp_path / "adapter")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_a_shared_weight(tmp_path):
    tiny_llama(num_hidden_layers=1, vocab_size=64, tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    made = start(open_checkpoint(tmp_path / "base"), SorsaConfig(r=2, target_modules=["lm_head"]), tmp_path / "delta")
    tied = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    assert made.ranks == PeftModel.from_pretrained(tied, made.adapter).peft_config["default"].ranks


def test_a_weight_that_cannot_be_decomposed_leaves_nothing(folder, tmp_path):
    checkpoint = open_checkpoint(folder)
    name = "model.layers.2.self_attn.v_proj.weight"
    readers = checkpoint.readers | {name: lambda: torch.full((16, 32), float("nan"))}
    broken = Checkpoint(checkpoint.name, checkpoint.model, readers, checkpoint.bytes)
    with pytest.raises(SvdtuneError, match=r"layers\.2\.self_attn\.v_proj: .*NaN"):
        start(broken, SorsaConfig(r=2, target_modules=QV), tmp_path / "adapter")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
