"""Any LoRA, the difference of two models, and a PiSSA adapter less its start, as a LoRA of the rank
or the error that was asked for."""

import re
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import svdtune
from pairwise import all_pairs
from svdtune import SorsaConfig, SvdtuneError
from svdtune.cli import app
from svdtune.export.lora import Cut
from tiny import moved, tiny_gpt2, tiny_llama

TOKENS = torch.arange(1, 25).view(2, 12)
LORAS = {
    "lora": {"lora_alpha": 12},
    "rslora": {"lora_alpha": 3, "use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 3, "c_attn": 3}, "alpha_pattern": {"q_proj": 1, "c_attn": 1}},
    "bf16": {"lora_alpha": 16},
    "with a module": {"modules_to_save": ["norm", "ln_f"]},
}


def model_of(family: str):
    return tiny_gpt2() if family == "gpt2" else tiny_llama(tie_word_embeddings=False)


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=TOKENS).logits.float()


def seeded(model):
    torch.manual_seed(5)
    return moved(model).eval()


def lora_in(folder: Path, family: str, name: str, **more):
    settings = {
        "r": 6,
        "task_type": "CAUSAL_LM",
        "fan_in_fan_out": family == "gpt2",
        **LORAS[name],
        **more,
    }
    targets = ["c_attn", "c_fc"] if family == "gpt2" else ["q_proj", "down_proj"]
    model = seeded(get_peft_model(model_of(family), LoraConfig(target_modules=targets, **settings)))
    if name == "bf16":
        for key, parameter in model.named_parameters():
            if ".lora_" in key:
                parameter.data = parameter.data.bfloat16()
    model.save_pretrained(folder)
    return PeftModel.from_pretrained(model_of(family), folder).eval()


def changes(model) -> dict[str, torch.Tensor]:
    """ΔW [out, in] in fp64 by layer of a LoRA model."""
    found = {}
    for name, layer in model.named_modules():
        if getattr(layer, "lora_A", None):
            A, B = (getattr(layer, f"lora_{part}")["default"].weight.detach().double().flatten(1) for part in "AB")
            found[name.removeprefix("base_model.model.")] = layer.scaling["default"] * B @ A
    return found


@pytest.mark.parametrize(
    ("name", "family", "cut"),
    all_pairs(LORAS, ["llama", "gpt2"], [Cut(), Cut(rank=2), Cut(error=0.3), Cut(error=1e-9)]),
    ids=str,
)
def test_a_lora_is_cut_to_the_best_there_is(name, family, cut, tmp_path):
    whole = lora_in(tmp_path / "lora", family, name)
    report = svdtune.export_lora(tmp_path / "lora", tmp_path / "cut", rank=cut.rank, error=cut.error)
    smaller = PeftModel.from_pretrained(model_of(family), tmp_path / "cut").eval()
    before, after = changes(whole), changes(smaller)
    assert before.keys() == after.keys() == report.ranks.keys()
    for layer, change in before.items():
        s = torch.linalg.svdvals(change)
        rank, norm = report.ranks[layer], float(s.norm())
        error = float((after[layer] - change).norm()) / norm
        assert error == pytest.approx(float(s[rank:].norm()) / norm, rel=1e-4, abs=1e-6)
        assert report.errors.get(layer, 0.0) == pytest.approx(error, rel=1e-4, abs=1e-6)
        if cut.rank is not None:
            assert rank == 2
        elif cut.error == 0.3:
            assert float(s[rank:].norm()) <= 0.3 * norm < float(s[rank - 1 :].norm())
        else:
            assert rank == (3 if name == "patterns" and layer.endswith(("q_proj", "c_attn")) else 6)
    if not report.errors:
        torch.testing.assert_close(logits(smaller), logits(whole), rtol=0, atol=2e-5)


def test_a_convolutions_lora_is_cut(tmp_path):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Conv2d(6, 8, 3))
    config = LoraConfig(r=5, target_modules=["0"])
    whole = seeded(get_peft_model(base, config))
    whole.save_pretrained(tmp_path / "lora")
    report = svdtune.export_lora(tmp_path / "lora", tmp_path / "cut", rank=2)
    smaller = PeftModel.from_pretrained(whole.unload(), tmp_path / "cut")
    whole = PeftModel.from_pretrained(nn.Sequential(smaller.get_base_model()[0].get_base_layer()), tmp_path / "lora")
    change = changes(whole)["0"]
    best = torch.linalg.svdvals(change)
    assert float((changes(smaller)["0"] - change).norm()) == pytest.approx(float(best[2:].norm()), rel=1e-4)
    assert report.ranks == {"0": 2}


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"target_modules": ["embed_tokens"]}], ids=str)
def test_a_lora_that_adds_more_is_refused(settings, tmp_path):
    config = LoraConfig(**{"r": 4, "target_modules": ["q_proj"], **settings})
    get_peft_model(model_of("llama"), config).save_pretrained(tmp_path / "lora", save_embedding_layers=False)
    message = "adds something else than B A" if "use_dora" in settings else "only lora_A and lora_B of linear layers"
    with pytest.raises(SvdtuneError, match=message):
        svdtune.export_lora(tmp_path / "lora", tmp_path / "cut", rank=2)
    assert not (tmp_path / "cut").exists()


def test_lora_and_sorsa_combine(tmp_path):
    lora_in(tmp_path / "lora", "llama", "lora")
    seeded(get_peft_model(model_of("llama"), SorsaConfig(r=2, target_modules=["q_proj"]))).save_pretrained(
        tmp_path / "sorsa"
    )
    report = svdtune.combine({tmp_path / "lora": 0.5, tmp_path / "sorsa": 1.0}, tmp_path / "both")
    assert report.ranks["model.layers.0.self_attn.q_proj"] == 6 + 4
    assert report.ranks["model.layers.0.mlp.down_proj"] == 6
    expected = changes(PeftModel.from_pretrained(model_of("llama"), tmp_path / "lora"))
    both = changes(PeftModel.from_pretrained(model_of("llama"), tmp_path / "both"))
    for layer in both:
        if "down_proj" in layer:
            torch.testing.assert_close(both[layer], 0.5 * expected[layer], rtol=0, atol=1e-6)


@pytest.fixture
def tuned(tmp_path):
    """A model, and one that differs in its linear layers by rank 3 and little noise."""
    model_of("llama").save_pretrained(tmp_path / "base", max_shard_size="30KB")
    model = model_of("llama")
    torch.manual_seed(2)
    with torch.no_grad():
        for layer in model.model.layers:
            weight = layer.mlp.up_proj.weight
            weight += 0.05 * torch.randn(len(weight), 3) @ torch.randn(3, weight.shape[1]) + 1e-4 * torch.randn_like(
                weight
            )
    model.save_pretrained(tmp_path / "tuned")
    return tmp_path


class TestDifference:
    @pytest.mark.parametrize("cut", [{"rank": 3}, {"error": 1e-2}, {"rank": 99}], ids=str)
    def test_it_is_the_tuned_model_to_the_error_stated(self, tuned, cut):
        report = svdtune.export_lora(tuned / "tuned", tuned / "lora", base=tuned / "base", **cut)
        assert set(report.ranks) == {f"model.layers.{i}.mlp.up_proj" for i in range(2)}
        assert set(report.ranks.values()) == {32 if cut.get("rank") == 99 else 3}
        before, after = (AutoModelForCausalLM.from_pretrained(tuned / name) for name in ("base", "tuned"))
        model = PeftModel.from_pretrained(before, tuned / "lora")
        for layer, change in changes(model).items():
            base, target = (each.get_submodule(layer) for each in (before, after))
            exact = (target.weight - base.get_base_layer().weight).detach().double()
            error = float((change - exact).norm() / exact.norm())
            assert error == pytest.approx(report.errors.get(layer, 0.0), rel=1e-2, abs=1e-5)
            assert error <= 1e-2
        torch.testing.assert_close(logits(model), logits(after), rtol=0, atol=2e-2)
        assert report.notes == []

    def test_what_a_lora_does_not_hold_is_named(self, tuned):
        model = AutoModelForCausalLM.from_pretrained(tuned / "tuned")
        model.model.norm.weight.data += 1
        model.save_pretrained(tuned / "more")
        report = svdtune.export_lora(tuned / "more", tuned / "lora", base=tuned / "base", rank=3)
        assert [note for note in report.notes if "1 weights differ too" in note and "model.norm.weight" in note]

    @pytest.mark.parametrize(
        ("other", "cut", "message"),
        [
            ("base", {"rank": 2}, "have the same linear layers, so there is nothing to write"),
            ("tuned", {}, "has full rank; give the rank, or the error that is allowed"),
            ("wide", {"rank": 2}, "they are no two checkpoints of one model"),
            ("deep", {"rank": 2}, "are no two checkpoints of one model: .* is in one alone"),
        ],
    )
    def test_what_is_no_difference(self, tuned, other, cut, message):
        tiny_llama(tie_word_embeddings=False, intermediate_size=40).save_pretrained(tuned / "wide")
        tiny_llama(tie_word_embeddings=False, num_hidden_layers=3).save_pretrained(tuned / "deep")
        with pytest.raises(SvdtuneError, match=message):
            svdtune.export_lora(tuned / other, tuned / "lora", base=tuned / "base", **cut)
        assert not (tuned / "lora").exists()


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("rslora", [False, True])
def test_a_trained_pissa_becomes_a_lora_on_the_untouched_model(init, rslora, tmp_path):
    model_of("llama").save_pretrained(tmp_path / "base")
    config = LoraConfig(
        init_lora_weights=init, r=4, lora_alpha=6, use_rslora=rslora, target_modules=["q_proj"], task_type="CAUSAL_LM"
    )
    made = svdtune.start(tmp_path / "base", config, tmp_path / "start")
    left = AutoModelForCausalLM.from_pretrained(made.residual)
    trained = seeded(PeftModel.from_pretrained(left, made.adapter, is_trainable=True))
    trained.save_pretrained(tmp_path / "trained")
    words = ["--start", made.adapter, "--base", tmp_path / "base", "--output", tmp_path / "lora"]
    result = CliRunner().invoke(app, ["export", str(tmp_path / "trained"), *map(str, words)])
    assert result.exit_code == 0, result.output
    assert "LoRA of rank 8 in 2 layers" in result.output
    lora = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "lora")
    assert lora.peft_config["default"].base_model_name_or_path == str(tmp_path / "base")
    torch.testing.assert_close(logits(lora), logits(trained), rtol=0, atol=1e-5)
    assert float((logits(lora) - logits(model_of("llama"))).abs().max()) > 1e-3


def test_a_start_of_another_adapter_is_refused(tmp_path):
    lora_in(tmp_path / "one", "llama", "lora")
    lora_in(tmp_path / "two", "llama", "lora", r=3)
    model_of("llama").save_pretrained(tmp_path / "base")
    with pytest.raises(SvdtuneError, match="and the one that it started from differ in layer"):
        svdtune.export_lora(tmp_path / "one", tmp_path / "lora", base=tmp_path / "base", start=tmp_path / "two")


def test_a_start_needs_the_untouched_model(tmp_path):
    model_of("llama").save_pretrained(tmp_path / "base")
    config = LoraConfig(init_lora_weights="pissa", r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    made = svdtune.start(tmp_path / "base", config, tmp_path / "start")
    with pytest.raises(
        SvdtuneError, match="is for the model from before the start was taken off; name that model as base"
    ):
        svdtune.export_lora(made.adapter, tmp_path / "lora", start=made.adapter)


@pytest.mark.parametrize(
    ("cut", "message"),
    [
        ({"rank": 2, "error": 0.1}, "rank and error each say how far to cut; give one of them"),
        ({"rank": 0}, "the rank to export to must be at least 1; got 0"),
        ({"error": 0.0}, "the error allowed to each layer must lie between 0 and 1; got 0.0"),
        ({"error": float("nan")}, "must lie between 0 and 1; got nan"),
    ],
)
def test_cuts_that_are_none(cut, message, tmp_path):
    with pytest.raises(SvdtuneError, match=re.escape(message)):
        svdtune.export_lora(tmp_path, tmp_path / "lora", **cut)


def test_by_the_command_line(tmp_path):
    lora_in(tmp_path / "lora", "llama", "lora")
    result = CliRunner().invoke(
        app, ["export", str(tmp_path / "lora"), "--output", str(tmp_path / "cut"), "--error", "0.5"]
    )
    assert result.exit_code == 0, result.output
    assert len(re.findall(r"relative error [0-4]\.\d+e-01", result.output)) == 4
    assert len(load_file(tmp_path / "cut" / "adapter_model.safetensors")) == 8
