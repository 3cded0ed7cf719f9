"""A model split into residual and SORSA adapter starts as the model that was split, quantized or
not, and trains."""

import dataclasses

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn
from transformers import AutoModelForCausalLM

from svdtune import SorsaConfig, SvdtuneError
from svdtune.export.lora import export_lora
from svdtune.export.split import split_checkpoint
from svdtune.methods.layers.matrices import observed_layers
from svdtune.models import load
from tiny import tiny_gpt2, tiny_llama

TOKENS = torch.arange(2, 26).view(2, 12)


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=TOKENS).logits.float()


def move(model, size=0.1):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += size * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_starts_as_the_model_that_was_split(tiny_folder, tmp_path, dtype):
    before = logits(load(tiny_folder, dtype=dtype).model)
    split = split_checkpoint(tiny_folder, tmp_path / "split", SorsaConfig(r=4), dtype=dtype)
    residual = AutoModelForCausalLM.from_pretrained(split.residual, dtype="auto")
    alone = logits(residual)
    assert residual.dtype == getattr(torch, dtype)
    assert not torch.allclose(alone, before, atol=1e-2)
    model = PeftModel.from_pretrained(residual, split.adapter, is_trainable=True)
    tolerance = {"float32": 1e-5, "bfloat16": 2e-2}[dtype] * float(before.abs().max())
    assert torch.allclose(logits(model), before, atol=tolerance)

    trained = logits(move(model))
    assert not torch.allclose(trained, before, atol=2 * tolerance)
    with model.disable_adapter():  # the model before training, not the residual
        assert torch.allclose(logits(model), before, atol=tolerance)
    model.save_pretrained(tmp_path / "trained")
    loaded = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(split.residual, dtype="auto"), tmp_path / "trained"
    )
    assert torch.equal(logits(loaded), trained)
    export_lora(tmp_path / "trained", tmp_path / "lora")
    lora = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(split.residual, dtype="auto"), tmp_path / "lora"
    )
    assert lora.peft_config["default"].r == 4  # the residual's own, not twice that
    assert torch.allclose(logits(lora), trained, atol=tolerance)
    model.merge_adapter()
    assert torch.allclose(logits(model), trained, atol=tolerance)
    model.unmerge_adapter()
    assert torch.equal(logits(model), trained)
    assert torch.equal(logits(model.unload()), alone)


def test_the_split_adapter_belongs_to_its_residual(tiny_folder, tmp_path):
    split = split_checkpoint(tiny_folder, tmp_path / "split", SorsaConfig(r=4))
    with pytest.raises(SvdtuneError, match="made from another base model"):
        PeftModel.from_pretrained(load(tiny_folder).model, split.adapter)
    with pytest.raises(SvdtuneError, match=r"layout='split' says .*split_checkpoint"):
        SorsaConfig(r=4, layout="split")


def test_it_stands_alone_on_its_layers(tiny_folder, tmp_path):
    """Its base lacks the principal part, to which another adapter's change would have to be
    added."""
    split = split_checkpoint(tiny_folder, tmp_path / "split", SorsaConfig(r=4, target_modules=["q_proj"]))
    model = PeftModel.from_pretrained(load(split.residual).model, split.adapter)
    before = logits(model)
    for adapter in (SorsaConfig(r=2, target_modules=["q_proj"]), SorsaConfig(r=2)):
        with pytest.raises(
            SvdtuneError, match=r"q_proj' was stored without .*Load each adapter onto a model of its own"
        ):
            model.add_adapter("second", adapter)
    with pytest.raises(SvdtuneError, match="no second adapter can stand on that layer"):
        model.load_adapter(split.adapter, "again")
    assert list(model.peft_config) == ["default"]
    assert torch.equal(logits(model), before)

    whole = logits(load(tiny_folder).model)
    model.add_adapter("elsewhere", SorsaConfig(r=2, target_modules=["v_proj"]))
    model.set_adapter("elsewhere")  # the layers of the first go on as the model that was split
    assert torch.allclose(logits(model), whole, atol=1e-5)


def test_a_tied_head_is_refused(tiny_tokenizer, tmp_path):
    tiny_llama(vocab_size=258, tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    with (
        pytest.warns(UserWarning, match="tie_word_embeddings"),
        pytest.raises(SvdtuneError, match=r"'lm_head' is also that of other modules .*`exclude_modules`"),
    ):
        split_checkpoint(tmp_path / "base", tmp_path / "split", SorsaConfig(r=4, target_modules=["lm_head"]))
    assert not (tmp_path / "split").exists()


@pytest.mark.parametrize("settings", [{}, {"fused_slices": {"c_attn": ["q", "v"]}}], ids=["whole", "slices"])
def test_transposed_weights_and_slices(settings, tiny_tokenizer, tmp_path):
    tiny_gpt2(vocab_size=258, n_positions=64).save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    before = logits(load(tmp_path / "base").model)
    config = SorsaConfig(r=3, target_modules=["c_attn"], **settings)
    split = split_checkpoint(tmp_path / "base", tmp_path / "split", config)
    alone = logits(load(split.residual).model)
    model = PeftModel.from_pretrained(load(split.residual).model, split.adapter, is_trainable=True)
    assert not torch.allclose(alone, before, atol=1e-2)
    assert torch.allclose(logits(model), before, atol=1e-5)
    trained = logits(move(model))
    with model.disable_adapter():
        assert torch.allclose(logits(model), before, atol=1e-5)
    model.merge_adapter()
    assert torch.allclose(logits(model), trained, atol=1e-5)
    assert torch.equal(logits(model.unload()), alone)


def test_a_split_convolution():
    """As `split_checkpoint` would write it, if there were causal language models with one."""
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2, stride=2)), torch.randn(2, 4, 9, 9)
    before, weight = net(x).detach(), net[0].weight.detach().clone()
    delta = get_peft_model(net, SorsaConfig(r=2, target_modules=["0"]))
    tensors = get_peft_model_state_dict(delta)
    config = dataclasses.replace(delta.peft_config["default"], layout="split", initialized=True, base_fingerprint={})
    P0, V0 = (tensors[f"base_model.model.0.frozen_{name}"] for name in ("P0", "V0"))
    residual = delta.unload()
    residual[0].weight.data -= (P0 @ V0.mT).view_as(weight)
    model = get_peft_model(residual, config)
    set_peft_model_state_dict(model, tensors)
    assert torch.allclose(model(x), before, atol=1e-5)
    changed = move(model)(x)
    assert not torch.allclose(changed, before, atol=1e-2)
    with model.disable_adapter():
        assert torch.allclose(model(x), before, atol=1e-5)
    assert torch.allclose(model.merge_and_unload()(x), changed, atol=1e-5)


def test_its_analysis_is_of_the_whole_weight(tiny_folder, tmp_path):
    split = split_checkpoint(tiny_folder, tmp_path / "split", SorsaConfig(r=4, target_modules=["q_proj"]))
    base = load(tiny_folder).model
    model = move(PeftModel.from_pretrained(load(split.residual).model, split.adapter, is_trainable=True))
    for layer in observed_layers(model):
        start = layer.start()
        torch.testing.assert_close(start, base.get_submodule(layer.name).weight, rtol=1e-5, atol=1e-6)
        A, B = layer.added_pair()
        torch.testing.assert_close(B @ A.mT, layer.weight() - start, rtol=1e-4, atol=1e-5)


def test_nothing_is_overwritten(tiny_folder, tmp_path):
    (tmp_path / "split").mkdir()
    (tmp_path / "split" / "notes").touch()
    with pytest.raises(SvdtuneError, match="is not empty"):
        split_checkpoint(tiny_folder, tmp_path / "split", SorsaConfig(r=4))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_quantized_residual_is_nearer_to_the_model(tiny_tokenizer, tmp_path):
    """And nf4 training goes on from there."""
    bnb = pytest.importorskip("bitsandbytes")

    def quantized(folder):
        model = AutoModelForCausalLM.from_pretrained(folder)
        for name, module in list(model.named_modules()):
            if isinstance(module, torch.nn.Linear) and name != "lm_head":
                new = bnb.nn.Linear4bit(
                    module.in_features, module.out_features, bias=False, quant_type="nf4", compute_dtype=torch.float32
                )
                new.weight = bnb.nn.Params4bit(module.weight.data, requires_grad=False, quant_type="nf4")
                setattr(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], new)
        return model.to("cpu")

    tiny_llama(hidden_size=64, intermediate_size=128, vocab_size=258, pad_token_id=1).save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    before = logits(load(tmp_path / "base").model)
    split = split_checkpoint(tmp_path / "base", tmp_path / "split", SorsaConfig(r=8))
    plain = float((logits(quantized(tmp_path / "base")) - before).norm())
    model = PeftModel.from_pretrained(quantized(split.residual), split.adapter, is_trainable=True)
    assert float((logits(model) - before).norm()) < 0.95 * plain
    model.train()(input_ids=TOKENS, labels=TOKENS).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)
