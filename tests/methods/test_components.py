"""SORSA on any triplets of the spectrum: from a float64 SVD, through training, saving, merging and
export."""

import pytest
import torch
from peft import PeftModel, get_peft_model

from pairwise import all_pairs
from svdtune import SorsaConfig, SvdtuneError
from svdtune.export.lora import export_lora
from svdtune.export.split import split_checkpoint
from svdtune.planning import plan
from svdtune.spectra import base_weight
from tiny import save_tiny_llama, tiny_gpt2, tiny_llama

TOKENS = torch.arange(1, 25).view(2, 12)
COMPONENTS = {"first": 4, "middle": 4, "last": 4, (3, 8): None}


def base(family: str, dtype: torch.dtype = torch.float32):
    return (tiny_gpt2() if family == "gpt2" else tiny_llama()).to(dtype)


def config(components, **settings):
    return SorsaConfig(r=COMPONENTS[components], components=components, task_type="CAUSAL_LM", **settings)


@torch.no_grad()
def logits(model):
    return model(input_ids=TOKENS).logits


def trained(family: str, components, **settings):
    model = get_peft_model(base(family), config(components, **settings))
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter -= 0.5 * parameter.grad
    return model.eval()


@pytest.mark.parametrize(
    ("components", "family", "dtype", "compact"),
    all_pairs(COMPONENTS, ["llama", "gpt2"], [torch.float32, torch.bfloat16], [False, True]),
    ids=str,
)
def test_the_start_is_the_band_of_a_float64_svd(components, family, dtype, compact):
    model = base(family, dtype)
    before = logits(model)
    adapted = get_peft_model(model, config(components, compact=compact)).eval()
    assert torch.equal(logits(adapted), before)  # U diag(s) Vᵀ − P₀ V₀ᵀ is exactly zero
    for layer in (m for m in adapted.modules() if hasattr(m, "sorsa_U")):
        weight = base_weight(layer).double()
        n = min(weight.shape)
        r = COMPONENTS[components] or 5
        start = {"first": 0, "middle": (n - 4) // 2, "last": n - 4, (3, 8): 3}[components]
        s = torch.linalg.svdvals(weight)
        U, own, V = (getattr(layer, f"sorsa_{part}")["default"].detach().double() for part in "UsV")
        assert (U.shape, V.shape) == ((weight.shape[0], r), (weight.shape[1], r))
        torch.testing.assert_close(own, s[start : start + r], rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(weight @ V, U * own, rtol=0, atol=1e-6)
        torch.testing.assert_close(weight.mT @ U, V * own, rtol=0, atol=1e-6)


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("components", COMPONENTS, ids=str)
def test_saved_merged_and_exported_it_stays_the_same_function(components, compact, tmp_path):
    model = trained("llama", components, compact=compact)
    expected = logits(model)
    assert float((expected - logits(base("llama"))).abs().max()) > 1e-3
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(base("llama"), tmp_path / "adapter").eval()
    assert torch.equal(logits(loaded), expected)
    assert loaded.peft_config["default"].components == (components if isinstance(components, str) else [3, 8])
    if not compact:
        report = export_lora(tmp_path / "adapter", tmp_path / "lora")
        assert set(report.ranks.values()) == {2 * (COMPONENTS[components] or 5)}
        lora = PeftModel.from_pretrained(base("llama"), tmp_path / "lora").eval()
        torch.testing.assert_close(logits(lora), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(logits(model.merge_and_unload()), expected, rtol=0, atol=1e-5)


def test_a_split_takes_the_last_ones_off(tmp_path, tiny_tokenizer):
    folder = save_tiny_llama(tmp_path / "base", tiny_tokenizer, tie_word_embeddings=False)
    split = split_checkpoint(
        folder, tmp_path / "split", SorsaConfig(r=4, components="last", target_modules=["up_proj"])
    )
    model, left = (type(tiny_llama()).from_pretrained(each) for each in (folder, split.residual))
    both = PeftModel.from_pretrained(type(left).from_pretrained(split.residual), split.adapter).eval()
    torch.testing.assert_close(logits(both), logits(model.eval()), rtol=0, atol=1e-5)
    for whole, rest in zip(model.model.layers, left.model.layers, strict=True):
        s, t = (torch.linalg.svdvals(layer.mlp.up_proj.weight.double()) for layer in (whole, rest))
        torch.testing.assert_close(t[:-4], s[:-4], rtol=0, atol=1e-6)
        assert float(t[-4:].detach().max()) < 1e-6


@pytest.mark.parametrize("wrong", ["most", (4, 4), (-1, 3), (2, 3, 4), (0.0, 3.0), 5, [True, 3]], ids=str)
def test_what_is_no_part_of_a_spectrum_is_refused(wrong):
    with pytest.raises(SvdtuneError, match=r"`components` must be one of 'first', 'middle', 'last'"):
        SorsaConfig(components=wrong)


@pytest.mark.parametrize("more", [{"r": 4}, {"threshold": 0.5}, {"rank_pattern": {"q_proj": 2}}], ids=str)
def test_a_band_has_one_rank(more):
    with pytest.raises(SvdtuneError, match=r"`components` \(3, 8\) is 5 triplets in every layer, so no threshold"):
        SorsaConfig(components=(3, 8), **more)
    assert SorsaConfig(components=(3, 8), r=5, rank_pattern={"q_proj": 5}).r == 5


def test_a_band_beyond_a_layer_leaves_the_model_alone():
    model = tiny_llama()
    with pytest.raises(SvdtuneError, match=r"has 32 singular triplets, and `components` \(30, 34\) goes beyond"):
        get_peft_model(model, SorsaConfig(components=(30, 34)))
    assert not any("sorsa" in name for name, _ in model.named_modules())


def test_a_band_takes_no_budget():
    with pytest.raises(SvdtuneError, match="so no threshold, budget or other rank fits it"):
        plan(tiny_llama(), SorsaConfig(components=(0, 4)), budget="1%")
    assert set(plan(tiny_llama(), SorsaConfig(components="last"), budget="5%").sites.ranks.values()) > {1}
