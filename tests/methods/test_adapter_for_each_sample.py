"""`model(..., adapter_names=[...])`: each sample of a batch has the outputs that its adapter gives
it alone."""

import copy

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

import svdtune.lab.gates  # noqa: F401
from svdtune import MoSaraConfig, SaraConfig, SorsaConfig, SvdtuneError
from tiny import tiny_experts, tiny_gpt2, tiny_llama

NAMES = ["default", "__base__", "elsewhere", "wide", "default"]
TOKENS = torch.arange(1, 31).view(5, 6)
METHODS = {
    "sara": (SaraConfig, {}),
    "sorsa": (SorsaConfig, {}),
    "mosara": (MoSaraConfig, {}),
    "front": (MoSaraConfig, {"v_position": "front"}),
    "no_v": (MoSaraConfig, {"use_v": False}),
    "one_head": (MoSaraConfig, {"num_heads": 1}),
    "no_gate": (MoSaraConfig, {"gate": "none"}),
    "top1": (MoSaraConfig, {"gate": "top1"}),
}
LAYOUTS = {
    "linear": (lambda: tiny_llama(num_hidden_layers=1), {}, ["q_proj", "down_proj"], ["v_proj"]),
    "fused": (lambda: tiny_gpt2(n_layer=1), {"fused_slices": {"c_attn": ["q", "v"]}}, ["c_attn"], ["c_fc"]),
    "conv1d": (lambda: tiny_gpt2(n_layer=1), {"fused_slices": None}, ["c_attn", "c_proj"], ["c_fc"]),
}


def several(model, config, here, elsewhere, **settings):
    """A model with three adapters of random values: two of one kind, one on other layers, one of
    another rank."""
    kind, own = config
    settings |= own
    model = get_peft_model(model, kind(r=3, target_modules=here, **settings))
    model.add_adapter("like", kind(r=3, target_modules=here, **settings))
    slices = {"fused_slices": None} if "fused_slices" in settings else {}
    model.add_adapter("elsewhere", kind(r=2, target_modules=elsewhere, **settings | slices))
    model.add_adapter("wide", kind(r=5, target_modules=here, **settings))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in sorted(model.named_parameters()):
            if name.rpartition(".")[0].rpartition(".")[2].startswith(kind.method + "_"):
                tensor += torch.randn(tensor.shape, generator=generator)
    return model.eval()


@torch.no_grad()
def alone(model, name, tokens, call=lambda model, tokens: model(input_ids=tokens).logits):
    if name == "__base__":
        with model.disable_adapter():
            return call(model, tokens)
    model.set_adapter(name)
    return call(model, tokens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("method", METHODS)
def test_outputs_are_those_of_each_adapter_alone(method, layout, dtype):
    base, settings, here, elsewhere = LAYOUTS[layout]
    model = several(base().to(dtype), METHODS[method], here, elsewhere, **settings)
    for names in (NAMES, ["like", "default", "__base__", "default", "like"]):
        with torch.no_grad():
            together = model(input_ids=TOKENS, adapter_names=names).logits
        for name, tokens, found in zip(names, TOKENS, together, strict=True):
            expected = alone(model, name, tokens[None])[0]
            tolerance = 1e-5 if dtype == torch.float32 else 0.03
            assert float((found - expected).abs().max()) <= tolerance * float(expected.abs().max())
    if dtype == torch.float32:
        base = alone(model, "__base__", TOKENS)
        differ = [float((row - other).abs().max()) > 1e-3 for row, other in zip(together, base, strict=True)]
        assert differ == [True, True, False, True, True]


@pytest.mark.parametrize("method", ["sara", "sorsa", "mosara", "front"])
def test_convolutions(method):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Conv2d(4, 6, 3, padding=1, groups=2)

        def forward(self, x):
            return self.first(x)

    torch.manual_seed(0)
    kind, own = METHODS[method]
    model = get_peft_model(Net(), kind(r=3, target_modules=["first"], **own))
    model.add_adapter("other", kind(r=2, target_modules=["first"], **own))
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if f"{kind.method}_" in name:
                tensor += torch.randn_like(tensor)
    model.eval()
    x, names = torch.randn(3, 4, 5, 5), ["default", "other", "__base__"]
    with torch.no_grad():
        together = model(x, adapter_names=names)
    for i, name in enumerate(names):
        expected = alone(model, name, x[i : i + 1], lambda model, x: model(x))
        assert torch.allclose(together[i], expected[0], atol=1e-5)


def test_a_split_base_is_made_whole_for_samples_of_other_adapters():
    """Samples without the adapter whose principal part the checkpoint lacks have it added."""
    model = get_peft_model(tiny_llama(num_hidden_layers=1), SorsaConfig(r=3, target_modules=["q_proj"])).eval()
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    whole = model(input_ids=TOKENS).logits
    with torch.no_grad():
        layer.base_layer.weight -= layer.frozen_P0["default"] @ layer.frozen_V0["default"].mT
    model.peft_config["default"].layout = "split"
    with torch.no_grad():
        mixed = model(input_ids=TOKENS[:2], adapter_names=["__base__", "default"]).logits
    assert torch.allclose(mixed, whole[:2], atol=1e-5)


@pytest.mark.parametrize("method", ["sara", "sorsa", "mosara"])
@pytest.mark.parametrize("beams", [1, 2])
def test_generate(method, beams):
    model = several(tiny_llama(num_hidden_layers=1), METHODS[method], ["q_proj", "down_proj"], ["v_proj"])

    def generate(model, tokens, **names):
        how = {"max_new_tokens": 4, "num_beams": beams, "do_sample": False, "pad_token_id": 0}
        return model.generate(input_ids=tokens, attention_mask=torch.ones_like(tokens), **how, **names)

    together = generate(model, TOKENS, adapter_names=NAMES)
    for name, tokens, found in zip(NAMES, TOKENS, together, strict=True):
        assert torch.equal(alone(model, name, tokens[None], generate)[0], found)


def test_beams_of_a_model_with_an_encoder():
    """Which sees each sample once."""
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    base = T5ForConditionalGeneration(T5Config(vocab_size=60, decoder_start_token_id=0, **sizes)).eval()
    model = several(base, METHODS["mosara"], ["q", "wo"], ["v"])

    def generate(model, tokens, **names):
        how = {"max_new_tokens": 3, "num_beams": 3, "do_sample": False}
        return model.generate(input_ids=tokens, attention_mask=torch.ones_like(tokens), **how, **names)

    together = generate(model, TOKENS, adapter_names=NAMES)
    for name, tokens, found in zip(NAMES, TOKENS, together, strict=True):
        assert torch.equal(alone(model, name, tokens[None], generate)[0], found)


def test_modules_to_save_are_each_samples_own():
    settings = {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    model = get_peft_model(tiny_llama(num_hidden_layers=1), MoSaraConfig(**settings))
    model.add_adapter("other", MoSaraConfig(**settings))
    with torch.no_grad():
        for name in ("default", "other"):
            model.base_model.model.lm_head.modules_to_save[name].weight += torch.randn(60, 32)
    model.eval()
    names = ["other", "__base__", "default"]
    with torch.no_grad():
        together = model(input_ids=TOKENS[:3], adapter_names=names).logits
    for name, tokens, found in zip(names, TOKENS, together, strict=False):
        assert torch.allclose(found, alone(model, name, tokens[None])[0], atol=1e-5)


@pytest.mark.parametrize("active", ["default", "other"])
def test_an_adapter_without_modules_to_save_has_the_bases(active):
    settings = {"r": 2, "target_modules": ["q_proj"]}
    config = SaraConfig(**settings, modules_to_save=["lm_head", "embed_tokens"])
    model = get_peft_model(tiny_llama(num_hidden_layers=1, tie_word_embeddings=False), config)
    model.add_adapter("other", SaraConfig(**settings))
    with torch.no_grad():
        for wrapper in (model.base_model.model.lm_head, model.base_model.model.model.embed_tokens):
            wrapper.modules_to_save["default"].weight += torch.randn(60, 32)
        model.eval().set_adapter(active)
        names = ["other", "__base__", "default"]
        together = model(input_ids=TOKENS[:3], adapter_names=names).logits
    for name, tokens, found in zip(names, TOKENS, together, strict=False):
        assert torch.allclose(found, alone(model, name, tokens[None])[0], atol=1e-5)


@pytest.fixture(scope="module")
def model():
    return several(tiny_llama(num_hidden_layers=1), METHODS["mosara"], ["q_proj"], ["v_proj"])


class TestRefused:
    @pytest.mark.parametrize("names", ["default", [1, 2, 3, 4, 5]], ids=["text", "numbers"])
    def test_what_is_no_list_of_names(self, model, names):
        with pytest.raises(SvdtuneError, match=r"`adapter_names` must be a list of an adapter's name for each sample"):
            model(input_ids=TOKENS, adapter_names=names)

    def test_a_name_that_is_no_adapters(self, model):
        with pytest.raises(
            SvdtuneError, match=r"'typo', which is none of the model's adapters: default, like, .*__base__"
        ):
            model(input_ids=TOKENS, adapter_names=["typo"] * 5)

    def test_a_thousand_names_are_not_listed(self):
        model = several(tiny_llama(num_hidden_layers=1), METHODS["mosara"], ["q_proj"], ["v_proj"])
        config = model.peft_config["default"]
        model.peft_config.update({f"user-{number}": config for number in range(1000)})
        names = ", ".join(list(model.peft_config)[:8])
        with pytest.raises(
            SvdtuneError, match=rf"adapters: {names} and {len(model.peft_config) - 8} more \(or '__base"
        ):
            model(input_ids=TOKENS, adapter_names=["typo"] * 5)

    def test_whole_modules_of_other_kinds(self):
        config = SaraConfig(r=2, target_modules=["q_proj"], modules_to_save=["norm"])
        model = get_peft_model(tiny_llama(num_hidden_layers=1), config).eval()
        with pytest.raises(
            SvdtuneError,
            match=r"by 'model\.layers\.0\.input_layernorm' of `modules_to_save`: .* and it is a LlamaRMSNorm",
        ):
            model(input_ids=TOKENS, adapter_names=["default"] * 5)

    def test_another_number_of_names(self, model):
        with pytest.raises(SvdtuneError, match=r"has 2 names, and a layer was given 5 samples\. Give a name for each"):
            model(input_ids=TOKENS, adapter_names=["default", "wide"])

    def test_training(self, model):
        model.train()
        try:
            with pytest.raises(
                SvdtuneError, match=r"is for inference, and the model is in training mode: call model\.eval"
            ):
                model(input_ids=TOKENS, adapter_names=NAMES)
        finally:
            model.eval()

    def test_merged_adapters_and_the_model_is_as_before(self, model):
        other = several(tiny_llama(num_hidden_layers=1), METHODS["sorsa"], ["q_proj"], ["v_proj"])
        before = alone(other, "default", TOKENS)
        other.merge_adapter()
        with pytest.raises(
            SvdtuneError, match=r"while an adapter is merged \(default\).*model\.unmerge_adapter\(\) first"
        ):
            other(input_ids=TOKENS, adapter_names=NAMES)
        other.unmerge_adapter()
        assert torch.equal(alone(other, "default", TOKENS), before)

    @pytest.mark.parametrize("fused", [True, False], ids=["fused", "list"])
    def test_experts_who_are_given_tokens(self, fused):
        class Listed(nn.Module):
            def __init__(self):
                super().__init__()
                self.experts = nn.ModuleList([nn.ModuleDict({"up": nn.Linear(4, 4)})])

            def forward(self, x):
                return self.experts[0]["up"](x)

        config = {"target_parameters": ["experts.down_proj"]} if fused else {"target_modules": ["up"]}
        base, tokens = (tiny_experts("mixtral"), TOKENS) if fused else (Listed(), torch.randn(5, 4))
        model = get_peft_model(base, SaraConfig(r=2, **config)).eval()
        with pytest.raises(
            SvdtuneError, match=r"by '.*experts.*': experts are given tokens, of any sample\. Call the model"
        ):
            model(tokens, adapter_names=["default"] * 5)

    def test_no_hook_stays_after_an_error(self, model):
        hooks = [len(module._forward_pre_hooks) for module in model.modules()]
        with pytest.raises(SvdtuneError):
            model(input_ids=TOKENS, adapter_names=["default"])
        assert [len(module._forward_pre_hooks) for module in model.modules()] == hooks


class TestFrozenTensorsAreShared:
    """Adapters of one base and rank have the same ones, in memory once."""

    @pytest.mark.parametrize("way", ["started", "loaded", "compact", "low_cpu_mem"])
    @pytest.mark.parametrize("method", ["sorsa", "mosara"])
    def test_in_memory_once(self, method, way, tmp_path, monkeypatch):
        kind = METHODS[method][0]
        config = kind(r=3, target_modules=["q_proj"], compact=way == "compact")
        model = get_peft_model(tiny_llama(num_hidden_layers=1), copy.deepcopy(config))
        if way == "started":
            model.add_adapter("other", config)
        else:
            model.save_pretrained(tmp_path)
            if way == "compact":
                monkeypatch.setattr("svdtune.spectra.factors", None)  # nothing is decomposed again
            model.load_adapter(tmp_path, "other", low_cpu_mem_usage=way == "low_cpu_mem")
        layer = model.base_model.model.model.layers[0].self_attn.q_proj
        for name in layer.frozen:
            assert getattr(layer, name)["other"] is getattr(layer, name)["default"]
        for name in layer.trained:
            assert getattr(layer, name)["other"] is not getattr(layer, name)["default"]
        model.set_adapter("other")
        model.delete_adapter("default")
        model.save_pretrained(tmp_path / "again")

    def test_a_file_with_others_changes_one_adapter_alone(self):
        model = get_peft_model(tiny_llama(num_hidden_layers=1), SorsaConfig(r=3, target_modules=["q_proj"]))
        model.add_adapter("other", SorsaConfig(r=3, target_modules=["q_proj"]))
        layer = model.base_model.model.model.layers[0].self_attn.q_proj
        before = layer.frozen_P0["default"].clone()
        layer.fill("other", {"frozen_P0": before + 1}, ())
        assert torch.equal(layer.frozen_P0["default"], before)
        assert torch.equal(layer.frozen_P0["other"], before + 1)
