"""An adapter exported to LoRA gives the same logits in stock PEFT, in a process that cannot import
svdtune."""

import copy
import json

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import T5Config, T5ForConditionalGeneration

import new_process
import stock_peft
from svdtune import MoSaraConfig, SaraConfig, SorsaConfig, SvdtuneError
from svdtune.export.lora import VLLM_RANKS, Cut, combine, export_lora, truncated
from tiny import moved, tiny_gpt2, tiny_llama

TOKENS = torch.arange(1, 25).view(2, 12)
EXACT = {
    "sara": SaraConfig(threshold=0.3),
    "sara-without-lambda": SaraConfig(r=3, use_lambda=False),
    "mosara": MoSaraConfig(threshold=0.5, num_heads=1),
    "mosara-without-gate": MoSaraConfig(r=5, num_heads=3, gate="none"),
    "mosara-front": MoSaraConfig(r=5, num_heads=1, v_position="front"),
    "sorsa": SorsaConfig(r=4),
    "sorsa-threshold": SorsaConfig(threshold=0.3),
    "few-layers": SorsaConfig(r=4, target_modules=["q_proj", "c_attn"], layers_to_transform=[1]),
    "all-but-one": SorsaConfig(r=4, target_modules="all-linear", exclude_modules=["down_proj", "c_proj"]),
    "pattern": SorsaConfig(r=4, target_modules=r".*\.1\..*(_proj|c_attn)"),
    "saved-module": SaraConfig(r=3, modules_to_save=["norm", "ln_f"]),
    "biases": SaraConfig(r=3, bias="sara_only"),
}


def model_of(family: str):
    return tiny_gpt2() if family == "gpt2" else tiny_llama(tie_word_embeddings=False)


def trained(config, family: str = "llama"):
    return moved(get_peft_model(model_of(family), copy.deepcopy(config)).eval())  # PEFT fills in targets


@torch.no_grad()
def logits(model):
    return model(input_ids=TOKENS).logits


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_stock_peft_gives_the_same_logits(family, tmp_path):
    model_of(family).save_pretrained(tmp_path / "base")
    expected = {}
    for name, config in EXACT.items():
        model = trained(config, family)
        expected[name] = logits(model)
        model.save_pretrained(tmp_path / name / "adapter")
        report = export_lora(tmp_path / name / "adapter", tmp_path / name / "lora")
        assert not report.errors
        assert set(report.ranks) == set(model.peft_config["default"].ranks)
    new_process.start(stock_peft.save_logits, tmp_path).result()
    base = logits(model_of(family))
    for name, logit in expected.items():
        got = torch.load(tmp_path / name / "lora.pt")
        effect, error = (float((other - logit).abs().max()) for other in (base, got))
        assert effect > 1e-3, name
        assert error < 2e-6 + 1e-3 * effect, (name, error, effect)


@pytest.mark.parametrize("name", ["sara", "mosara", "sorsa"])
def test_ranks_are_the_methods(name, tmp_path):
    model = trained(EXACT[name])
    model.save_pretrained(tmp_path / "adapter")
    times = 2 if isinstance(EXACT[name], SorsaConfig) else 1
    expected = {layer: times * rank for layer, rank in model.peft_config["default"].ranks.items()}
    assert export_lora(tmp_path / "adapter", tmp_path / "lora").ranks == expected


@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize("name", EXACT)
def test_the_rules_of_vllm_and_llama_cpp(name, uniform, tmp_path):
    """vLLM: r bounds every tensor's rank, one scale alpha / r, plain targets. llama.cpp: alpha /
    the tensor's own rank."""
    trained(EXACT[name]).save_pretrained(tmp_path / "adapter")
    report = export_lora(tmp_path / "adapter", tmp_path / "lora", uniform=uniform)
    config = json.loads((tmp_path / "lora/adapter_config.json").read_text())
    tensors = load_file(tmp_path / "lora/adapter_model.safetensors")
    assert config["peft_type"] == "LORA"
    assert config["lora_alpha"] / config["r"] == 1
    assert config["r"] <= VLLM_RANKS[-1]
    assert isinstance(config["target_modules"], list)
    assert not config["use_dora"]
    assert not config["use_rslora"]
    names = {key for key in tensors if ".lora_" in key}
    for layer, rank in report.ranks.items():
        A, B = (tensors[f"base_model.model.{layer}.lora_{part}.weight"] for part in "AB")
        names -= {f"base_model.model.{layer}.lora_{part}.weight" for part in "AB"}
        assert A.shape[0] == B.shape[1] == rank <= config["r"]
        assert any(layer == target or layer.endswith(f".{target}") for target in config["target_modules"])
        if uniform:
            assert config["lora_alpha"] / rank == 1
    assert not names
    assert any("llama.cpp" in note for note in report.notes) == (len(set(report.ranks.values())) > 1)
    refused = bool(config["modules_to_save"]) or config["bias"] != "none"
    assert any("vLLM refuses" in note for note in report.notes) == refused


def test_padding_to_one_rank_changes_nothing(tmp_path):
    model = trained(SaraConfig(threshold=0.3, target_modules="all-linear"))
    model.save_pretrained(tmp_path / "adapter")
    report = export_lora(tmp_path / "adapter", tmp_path / "lora", uniform=True)
    assert set(report.ranks.values()) == {max(model.peft_config["default"].ranks.values())}
    loaded = PeftModel.from_pretrained(model_of("llama"), tmp_path / "lora").eval()
    assert torch.allclose(logits(loaded), logits(model), atol=2e-5)


def test_cutting_the_rank_states_its_error(tmp_path):
    model = trained(SorsaConfig(r=4))
    model.save_pretrained(tmp_path / "adapter")
    report = export_lora(tmp_path / "adapter", tmp_path / "lora", cut=Cut(3))
    assert set(report.ranks.values()) == {3}
    tensors = load_file(tmp_path / "lora/adapter_model.safetensors")
    for layer, error in report.errors.items():
        delta = model.base_model.model.get_submodule(layer).delta("default").double()
        A, B = (tensors[f"base_model.model.{layer}.lora_{part}.weight"].double() for part in "AB")
        assert float((B @ A - delta).norm() / delta.norm()) == pytest.approx(error, rel=1e-4)
        best = torch.linalg.svdvals(delta)[3:].norm() / delta.norm()
        assert error == pytest.approx(float(best), rel=1e-4)
    assert f"{max(report.errors.values()):.2e}" in (tmp_path / "lora/README.md").read_text()


def change_by_layer(lora):
    tensors = load_file(lora / "adapter_model.safetensors")
    ends = ".lora_A.weight", ".lora_B.weight"
    layers = [key.removesuffix(ends[0]) for key in tensors if key.endswith(ends[0])]
    return {layer: tensors[layer + ends[1]].double() @ tensors[layer + ends[0]].double() for layer in layers}


class TestCombining:
    def saved(self, folder, config):
        trained(config).save_pretrained(folder)

    def test_different_methods_by_weight(self, tmp_path):
        self.saved(tmp_path / "first", SaraConfig(r=3))
        self.saved(tmp_path / "second", SorsaConfig(r=2))
        report = combine({tmp_path / "first": 0.7, tmp_path / "second": -0.2}, tmp_path / "lora")
        assert report.ranks["model.layers.0.self_attn.q_proj"] == 3 + 4
        assert report.ranks["model.layers.0.mlp.up_proj"] == 4
        for name in ("first", "second"):
            export_lora(tmp_path / name, tmp_path / f"{name}-lora")
        first, second = (change_by_layer(tmp_path / f"{name}-lora") for name in ("first", "second"))
        got = change_by_layer(tmp_path / "lora")
        assert set(got) == set(first) | set(second)
        for layer, change in got.items():
            assert torch.allclose(change, 0.7 * first.get(layer, 0) - 0.2 * second[layer], atol=1e-6)

    def test_cut_to_a_rank(self, tmp_path):
        for name in ("first", "second"):
            self.saved(tmp_path / name, SaraConfig(r=3))
        report = combine({tmp_path / "first": 1.0, tmp_path / "second": 1.0}, tmp_path / "lora", cut=Cut(4))
        assert set(report.ranks.values()) == {4}
        assert all(0 < error < 1 for error in report.errors.values())

    def test_outputs_are_those_of_both_adapters_active(self, tmp_path):
        self.saved(tmp_path / "first", SorsaConfig(r=3))
        self.saved(tmp_path / "second", SorsaConfig(r=2, target_modules=["up_proj"]))
        model = PeftModel.from_pretrained(model_of("llama"), tmp_path / "first", adapter_name="first").eval()
        model.load_adapter(tmp_path / "second", "second")
        model.base_model.set_adapter(["first", "second"])
        combine({tmp_path / "first": 1.0, tmp_path / "second": 1.0}, tmp_path / "lora")
        got = logits(PeftModel.from_pretrained(model_of("llama"), tmp_path / "lora").eval())
        assert torch.allclose(got, logits(model), atol=2e-5)

    def test_what_cannot_be_combined(self, tmp_path):
        self.saved(tmp_path / "first", SorsaConfig(r=3))
        trained(SaraConfig(r=3, modules_to_save=["norm"])).save_pretrained(tmp_path / "saves")
        config = json.loads((tmp_path / "first/adapter_config.json").read_text())
        with pytest.raises(SvdtuneError, match=r"also trains \S+norm\.weight, which has no weighted sum"):
            combine({tmp_path / "first": 1.0, tmp_path / "saves": 1.0}, tmp_path / "lora")
        self.saved(tmp_path / "second", SorsaConfig(r=3))
        config["base_fingerprint"]["model.layers.1.mlp.up_proj"] = "0" * 16
        config["weights_sha256"] = None
        (tmp_path / "second/adapter_config.json").write_text(json.dumps(config))
        with pytest.raises(SvdtuneError, match=r"another base model: layer 'model\.layers\.1\.mlp\.up_proj' differs"):
            combine({tmp_path / "first": 1.0, tmp_path / "second": 1.0}, tmp_path / "lora")
        with pytest.raises(SvdtuneError, match="no adapters to combine"):
            combine({}, tmp_path / "lora")
        with pytest.raises(SvdtuneError, match="combine them into one LoRA"):
            trained(SaraConfig(r=3)).add_weighted_adapter(["default"], [1.0], "sum")
        assert not (tmp_path / "lora").exists()


def test_a_rank_that_cuts_nothing_loses_nothing(tmp_path):
    trained(SaraConfig(r=3)).save_pretrained(tmp_path / "adapter")
    assert not export_lora(tmp_path / "adapter", tmp_path / "lora", cut=Cut(3)).errors


def test_truncating_a_zero_pair():
    A, B, error = truncated(torch.zeros(5, 4), torch.zeros(6, 4), Cut(2))
    assert (A.shape, B.shape, error) == ((5, 2), (6, 2), 0.0)


def test_a_rank_vllm_does_not_serve_is_noted(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(300, 300))
    get_peft_model(model, SorsaConfig(r=260, target_modules=["0"])).save_pretrained(tmp_path / "adapter")
    notes = export_lora(tmp_path / "adapter", tmp_path / "lora").notes
    assert any("up to 512; this one has 520" in note for note in notes)


def test_several_heads_are_refused_and_nothing_is_written(tmp_path):
    trained(MoSaraConfig(r=5, num_heads=3)).save_pretrained(tmp_path / "adapter")
    with pytest.raises(SvdtuneError, match="3 heads, which cannot be merged or exported: its router mixes"):
        export_lora(tmp_path / "adapter", tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


def tiny_t5():
    torch.manual_seed(0)
    config = T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, vocab_size=60, decoder_start_token_id=0)
    return T5ForConditionalGeneration(config).eval()


COMPACT = {
    "pattern": (tiny_llama, SorsaConfig(threshold=0.2, compact=True, target_modules=r".*\.1\..*_proj")),
    "one head": (tiny_llama, MoSaraConfig(r=3, compact=True, num_heads=1)),
    "no causal model": (tiny_t5, SorsaConfig(r=3, compact=True, target_modules=["q", "wo"])),
}


@pytest.mark.parametrize(("make", "config"), COMPACT.values(), ids=COMPACT)
def test_a_compact_adapter_needs_its_bases_weights_alone(make, config, tmp_path):
    """No tokenizer, and whatever the base's class is."""
    make().save_pretrained(tmp_path / "base")
    model = moved(get_peft_model(type(make()).from_pretrained(tmp_path / "base"), copy.deepcopy(config)).eval())
    model.save_pretrained(tmp_path / "adapter")
    export_lora(tmp_path / "adapter", tmp_path / "lora")
    more = {"decoder_input_ids": TOKENS} if make is tiny_t5 else {}
    with torch.no_grad():
        expected = model(input_ids=TOKENS, **more).logits
        found = PeftModel.from_pretrained(make(), tmp_path / "lora")(input_ids=TOKENS, **more).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_single_tokens_that_a_lora_trains_are_exported(tied, tmp_path):
    config = LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[3, 7])
    model = moved(get_peft_model(tiny_llama(tie_word_embeddings=tied), config).eval())
    model.save_pretrained(tmp_path / "adapter")
    export_lora(tmp_path / "adapter", tmp_path / "lora")
    exported = PeftModel.from_pretrained(tiny_llama(tie_word_embeddings=tied), tmp_path / "lora")
    torch.testing.assert_close(logits(exported), logits(model), rtol=0, atol=1e-5)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_lora_whose_start_peft_takes_off_the_weights_is_no_lora_of_the_model(init, tmp_path):
    trained(LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=init)).save_pretrained(tmp_path / "adapter")
    with pytest.raises(SvdtuneError, match=f"has init_lora_weights='{init}', so it belongs on weights"):
        export_lora(tmp_path / "adapter", tmp_path / "lora")
    with pytest.raises(SvdtuneError, match="and export the difference of the two models"):
        combine({tmp_path / "adapter": 1.0}, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


def test_other_folders_are_refused(tmp_path):
    with pytest.raises(SvdtuneError, match="that folder does not exist"):
        export_lora(tmp_path / "none", tmp_path / "lora")
    trained(SaraConfig(r=3)).save_pretrained(tmp_path / "adapter")
    export_lora(tmp_path / "adapter", tmp_path / "lora")
    get_peft_model(model_of("llama"), IA3Config(task_type="CAUSAL_LM")).save_pretrained(tmp_path / "other")
    with pytest.raises(SvdtuneError, match=r"adapter of type IA3; expected SARA, MOSARA, SORSA or LORA"):
        export_lora(tmp_path / "other", tmp_path / "again")
    with pytest.raises(SvdtuneError, match="not empty"):
        export_lora(tmp_path / "adapter", tmp_path / "lora")
    with pytest.raises(SvdtuneError, match="at least 1; got 0"):
        export_lora(tmp_path / "adapter", tmp_path / "again", cut=Cut(0))
    (tmp_path / "adapter/adapter_model.safetensors").unlink()
    with pytest.raises(SvdtuneError, match=r"has no adapter_model\.safetensors"):
        export_lora(tmp_path / "adapter", tmp_path / "again")
