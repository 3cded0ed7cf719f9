"""Adapters that change more than the weights of linear layers, and bases without a tokenizer:
exported and merged whole, or refused."""

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

import svdtune
from svdtune import SvdtuneError
from tiny import moved, tiny_experts, tiny_llama

TOKENS = torch.arange(1, 25).view(2, 12)


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=TOKENS).logits.float()


def saved(folder, config, **changes):
    """An adapter in `folder`/adapter on a base in `folder`/base, away from its start."""
    tiny_llama(**{"tie_word_embeddings": False} | changes).save_pretrained(folder / "base")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder / "base"), config)
    torch.manual_seed(3)
    moved(model).save_pretrained(folder / "adapter")
    return model


@pytest.mark.filterwarnings("ignore:Adapter 'default'")  # PEFT takes the bias of lora_B for a shard
@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=4, target_modules=["q_proj"], lora_bias=True),
        IA3Config(target_modules=["k_proj"], feedforward_modules=[]),
    ],
    ids=["lora_bias", "ia3"],
)
def test_a_bias_that_is_changed_is_not_left_as_it_was(config, tmp_path):
    model = saved(tmp_path, config, attention_bias=True)
    with pytest.raises(
        SvdtuneError, match=r"changes the bias of '\S+' too, and weights alone are merged here; merge in"
    ):
        svdtune.merge(tmp_path / "adapter", tmp_path / "merged", check=False)
    assert not (tmp_path / "merged").exists()
    merged = model.merge_and_unload(safe_merge=True)  # as advised
    whole = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    torch.testing.assert_close(logits(merged), logits(whole), rtol=0, atol=1e-5)


def test_a_lora_of_experts_is_sent_to_a_merge_that_takes_it(tmp_path):
    config = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["experts.down_proj"])
    get_peft_model(tiny_experts("qwen3_moe"), config).save_pretrained(tmp_path / "adapter")
    words = r"has target_parameters, so it is no LoRA of the base's layers alone; merge in memory: .*merge_and_unload"
    with pytest.raises(SvdtuneError, match=words):
        svdtune.export_lora(tmp_path / "adapter", tmp_path / "lora")


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`", "ignore:Model has `tie_word_embeddings")
@pytest.mark.parametrize("tied", [False, True])
def test_adapters_of_the_output_head_combine(tied, tmp_path):
    """PEFT saves the base's own weight of it too."""
    config = LoraConfig(r=4, target_modules=["q_proj", "lm_head"])
    model = saved(tmp_path, config, tie_word_embeddings=tied)
    svdtune.combine({tmp_path / "adapter": 1.0}, tmp_path / "same")
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "same")
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_heads_of_two_bases_do_not_combine(tmp_path):
    for name in ("one", "other"):
        config = LoraConfig(r=4, target_modules=["lm_head"])
        saved(tmp_path / name, config, vocab_size=60, initializer_range=0.02 if name == "one" else 0.05)
    adapters = {tmp_path / name / "adapter": 1.0 for name in ("one", "other")}
    with pytest.raises(
        SvdtuneError, match=r"was made from another base model: 'base_model\.model\.lm_head\.base_layer"
    ):
        svdtune.combine(adapters, tmp_path / "out")


def test_without_a_tokenizer_the_outputs_are_not_compared(tmp_path):
    """The LoRA is written, so an error would come too late."""
    saved(tmp_path, LoraConfig(r=4, target_modules=["q_proj"]))
    report = svdtune.export_lora(tmp_path / "adapter", tmp_path / "lora", base=tmp_path / "base")
    assert report.difference is None
    assert report.notes[-1].startswith("the outputs were not compared: the tokenizer of")
    with pytest.raises(SvdtuneError, match="there is no model at"):
        svdtune.export_lora(tmp_path / "adapter", tmp_path / "other", base=tmp_path / "nowhere")
    assert not (tmp_path / "other").exists()


def test_what_a_difference_leaves_out_is_said_of_a_gguf_file_too(tmp_path):
    pytest.importorskip("gguf")
    base = tiny_llama(tie_word_embeddings=False)
    base.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        for name, weight in base.named_parameters():
            if "q_proj" in name or "norm" in name:
                weight += 0.1 * torch.randn_like(weight)
    base.save_pretrained(tmp_path / "tuned")
    report = svdtune.export_lora(tmp_path / "tuned", tmp_path / "lora.gguf", base=tmp_path / "base", rank=2, to="gguf")
    assert [note.partition(" (")[0] for note in report.notes] == ["5 weights differ too and are no linear layer's"]
