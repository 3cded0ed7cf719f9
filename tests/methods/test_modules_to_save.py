"""Modules that are trained and saved whole beside an adapter: heads of several layers, and
embeddings of a resized vocabulary."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, RobertaConfig, RobertaForSequenceClassification

from svdtune import MoSaraConfig, SaraConfig, SorsaConfig, SvdtuneError, merge
from tiny import LLAMA, tiny_llama

CONFIGS = {
    "sara": lambda **s: SaraConfig(r=2, **s),
    "mosara": lambda **s: MoSaraConfig(r=2, num_heads=1, **s),
    "sorsa": lambda **s: SorsaConfig(r=2, **s),
}
TOKENS = torch.arange(2, 14).view(2, 6)


def classifier():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return RobertaForSequenceClassification(RobertaConfig(vocab_size=60, max_position_embeddings=40, **sizes)).eval()


def moved(model):
    """The model with every trained parameter changed, as training would."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


@torch.no_grad()
def logits(model):
    return model(TOKENS).logits


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("targets", [["query", "value"], ["query", "dense"], "all-linear"])
def test_a_head_of_several_layers_comes_and_goes_whole(method, targets, tmp_path):
    def adapted():
        config = CONFIGS[method](target_modules=targets, modules_to_save=["classifier"])
        return moved(get_peft_model(classifier(), config).eval())

    model, base = adapted(), classifier()
    with_adapter, without = logits(model), logits(base)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(classifier(), tmp_path)), with_adapter)
    with model.disable_adapter():
        assert torch.equal(logits(model), without)
    merged, unloaded = adapted().merge_and_unload(), model.unload()
    assert torch.allclose(logits(merged), with_adapter, atol=1e-6)
    for plain in (merged, unloaded):
        assert list(plain.state_dict()) == list(base.state_dict())
    for name, parameter in unloaded.named_parameters():
        assert name.startswith("classifier") or torch.equal(parameter, base.get_parameter(name))


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`", "ignore:Model has `tie_word_embeddings")
@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("whole", [["embed_tokens", "lm_head"], ["embed_tokens"], ["lm_head"]])
def test_resized_embeddings_that_are_trained_whole_load_and_merge(method, tied, whole, tmp_path):
    tiny_llama(tie_word_embeddings=tied).save_pretrained(tmp_path / "base")
    resized = tiny_llama(tie_word_embeddings=tied)
    resized.resize_token_embeddings(LLAMA["vocab_size"] + 4, mean_resizing=False)
    resized.save_pretrained(tmp_path / "resized")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(LLAMA["vocab_size"] + 4, mean_resizing=False)
    model = get_peft_model(base, CONFIGS[method](target_modules=["q_proj"], modules_to_save=whole)).eval()
    want = logits(moved(model))
    model.save_pretrained(tmp_path / "adapter")

    again = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    again.resize_token_embeddings(LLAMA["vocab_size"] + 4)
    loaded = PeftModel.from_pretrained(again, tmp_path / "adapter")
    assert torch.equal(logits(loaded), want)

    merge(tmp_path / "resized", tmp_path / "merged", adapter=tmp_path / "adapter")
    assert torch.allclose(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), want, atol=1e-6)
    with pytest.raises(SvdtuneError, match="resized vocabulary"):
        merge(tmp_path / "base", tmp_path / "never", adapter=tmp_path / "adapter", check=False)
