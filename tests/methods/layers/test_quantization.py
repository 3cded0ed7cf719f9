"""Adapters on quantized bases: bitsandbytes nf4 and int8, torchao and HQQ, each where it is
installed.

They run on CPUs too. With SVDTUNE_TEST_DEVICE=cuda the same tests run on a GPU.
"""

import importlib
import os
import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model
from test_peft_verbs import MERGEABLE, TOKENS, UNCHANGED_AT_START, config_of, layers, move

from svdtune import SorsaConfig, SvdtuneError
from svdtune.export import split
from svdtune.methods.layers.quantization import is_quantized
from svdtune.models import LoadedModel
from svdtune.spectra import base_weight
from tiny import tiny_llama

DEVICE = os.environ.get("SVDTUNE_TEST_DEVICE", "cpu")
KINDS = {"nf4": "bitsandbytes", "int8": "bitsandbytes", "torchao": "torchao", "hqq": "hqq"}
CHOSEN = ["sara", "sara-spectral", "mosara", "mosara-one-head", "sorsa"]
# what the quantizing packages say of CPUs, and PEFT of merging into their weights
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(params=KINDS)
def kind(request):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            importlib.import_module(KINDS[request.param])
        except ImportError:
            pytest.skip(f"needs {KINDS[request.param]}")
    return request.param


def quantized(layer: torch.nn.Linear, kind: str) -> torch.nn.Module:
    """A linear layer quantized as `from_pretrained` does it, which no release of transformers does
    for all of these."""
    weight, bias = layer.weight.data, layer.bias
    if kind == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        quantize_(layer, Int8WeightOnlyConfig())
        return layer
    if kind == "hqq":
        from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

        settings = BaseQuantizeConfig(nbits=4, group_size=32)
        settings["weight_quant_params"]["optimize"] = False  # slow, and not what is tested
        return HQQLinear(layer, settings, compute_dtype=torch.float32, device=DEVICE)
    import bitsandbytes as bnb

    sizes, has_bias = (layer.in_features, layer.out_features), bias is not None
    if kind == "nf4":
        new = bnb.nn.Linear4bit(*sizes, bias=has_bias, quant_type="nf4", compute_dtype=torch.float32)
        new.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
    else:
        new = bnb.nn.Linear8bitLt(*sizes, bias=has_bias, has_fp16_weights=False)
        new.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    new.bias = bias
    return new


def plain_model():
    return tiny_llama(hidden_size=64, intermediate_size=128, num_key_value_heads=2, tie_word_embeddings=False)


def model_of(kind: str):
    model = plain_model()
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            parent = model.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], quantized(module, kind))
    if kind == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig
        from transformers import TorchAoConfig

        settings = TorchAoConfig(Int8WeightOnlyConfig())
        model.hf_quantizer = type("Quantizer", (), {"quantization_config": settings})()
    return model.requires_grad_(False).to(DEVICE).eval()


def adapted(kind: str, name: str, moved: float = 0.05, **settings):
    targets = {"target_modules": ["q_proj", "v_proj", "down_proj"]}
    model = get_peft_model(model_of(kind), config_of(name, **(targets | settings))).eval()
    return move(model, moved)


@torch.no_grad()
def logits(model):
    return model(input_ids=TOKENS.to(DEVICE)).logits


@pytest.mark.parametrize("name", CHOSEN)
class TestEveryKind:
    def test_start_and_back(self, kind, name):
        base = logits(model_of(kind))
        model = adapted(kind, name, moved=0)
        assert all(is_quantized(layer.get_base_layer()) for layer in layers(model))
        assert model.peft_config["default"].base_fingerprint == {}
        if name in UNCHANGED_AT_START:
            assert torch.equal(logits(model), base)
        move(model, 0.1)
        assert not torch.allclose(logits(model), base, atol=1e-3)
        with model.disable_adapter():
            assert torch.equal(logits(model), base)
        assert torch.equal(logits(model.unload()), base)

    def test_outputs_and_gradients_are_those_on_the_dequantized_weight(self, kind, name):
        model = adapted(kind, name)
        if kind == "int8":
            # bitsandbytes multiplies in int8, which no float weight reproduces; the addition is
            # tested below
            return
        twin = plain_model()
        for key, module in model.base_model.model.named_modules():
            plain = key.removesuffix(".base_layer")
            if is_quantized_layer(module):
                twin.get_submodule(plain).weight.data = base_weight(module).float().cpu()
        twin = get_peft_model(twin.to(DEVICE), model.peft_config["default"].__class__(**clean(model)))
        for layer, other in zip(layers(model), layers(twin), strict=True):
            for part in (*layer.trained, *layer.frozen):
                for adapter, tensor in getattr(layer, part).items():
                    getattr(other, part)[adapter].data = tensor.data.clone()
        tokens = TOKENS.to(DEVICE)
        got, want = (m.eval()(input_ids=tokens, labels=tokens) for m in (model, twin))
        # On CPUs that can, bitsandbytes multiplies in bf16.
        assert float((got.logits - want.logits).detach().norm()) <= 1e-2 * float(want.logits.detach().norm())
        got.loss.backward()
        want.loss.backward()
        trained = [(p.grad, q.grad) for p, q in zip(trained_of(model), trained_of(twin), strict=True)]
        assert trained
        for one, other in trained:
            assert float((one - other).norm()) <= 2e-2 * float(other.norm()) + 1e-6

    def test_what_a_layer_adds(self, kind, name):
        model = adapted(kind, name)
        if name not in MERGEABLE:
            return
        layer = layers(model)[0]
        x = torch.randn(3, 64, device=DEVICE)
        want = layer.get_base_layer()(x) + x @ layer.delta("default").mT
        assert torch.allclose(layer(x).float(), want.float(), atol=2e-3)

    def test_it_trains(self, kind, name):
        model = adapted(kind, name, dropout=0.1).train()
        before = {key: p.detach().clone() for key, p in model.named_parameters() if p.requires_grad}
        optimizer = torch.optim.AdamW(trained_of(model), lr=1e-2)
        tokens = TOKENS.to(DEVICE)
        losses = []
        for _ in range(5):
            loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
        assert losses[-1] < losses[0]
        assert all(not torch.equal(p, before[key]) for key, p in model.named_parameters() if key in before)

    def test_save_and_load(self, kind, name, tmp_path, monkeypatch):
        model = adapted(kind, name)
        model.save_pretrained(tmp_path)
        monkeypatch.setattr("svdtune.spectra.factors", None)
        loaded = PeftModel.from_pretrained(model_of(kind), tmp_path).eval()
        assert torch.equal(logits(loaded), logits(model))

    def test_merge_quantizes_again_and_unmerge_gives_the_codes_back(self, kind, name):
        base = logits(model_of(kind))
        model = adapted(kind, name, moved=0.2)
        before = logits(model)
        if name not in MERGEABLE:
            with pytest.raises(SvdtuneError, match="heads, which cannot be merged"):
                model.merge_adapter()
            return
        model.merge_adapter()
        merged = logits(model)
        # nearer than the base: rounded
        assert float((merged - before).norm()) < 0.5 * float((before - base).norm())
        model.unmerge_adapter()
        assert torch.equal(logits(model), before)
        with model.disable_adapter():
            assert torch.equal(logits(model), base)
        assert torch.equal(logits(model.merge_and_unload(safe_merge=True)), merged)


def is_quantized_layer(module) -> bool:
    return (isinstance(module, torch.nn.Linear) or hasattr(module, "W_q")) and is_quantized(module)


def clean(model) -> dict:
    config = model.peft_config["default"]
    return {
        key: getattr(config, key)
        for key in ("init", "use_lambda", "num_heads", "task_type", "target_modules")
        if hasattr(config, key)
    } | {"r": None, "threshold": None, "rank_pattern": dict(config.ranks)}


def trained_of(model) -> list[torch.nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def test_a_quantized_model_is_not_split(kind, monkeypatch, tmp_path):
    loaded = LoadedModel(model_of(kind), None, "quantized")
    monkeypatch.setattr(split, "load", lambda *_, **__: loaded)
    with pytest.raises(SvdtuneError, match=r"q_proj' is quantized, and .* Split the unquantized model"):
        split.split_checkpoint("quantized", tmp_path / "split", SorsaConfig(r=4, target_modules=["q_proj"]))
    assert not list(tmp_path.iterdir())


def test_slices_of_a_quantized_weight(kind):
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    from transformers import Phi3Config, Phi3ForCausalLM

    model = Phi3ForCausalLM(Phi3Config(**sizes, vocab_size=60, pad_token_id=0)).eval()
    attention = model.model.layers[0].self_attn
    attention.qkv_proj = quantized(attention.qkv_proj, kind)
    model = model.requires_grad_(False).to(DEVICE).eval()
    base = logits(model)
    settings = {"target_modules": ["qkv_proj"], "fused_slices": "auto", "task_type": "CAUSAL_LM"}
    model = get_peft_model(model, SorsaConfig(r=4, **settings)).eval()
    assert torch.equal(logits(model), base)
    move(model, 0.1)
    assert not torch.allclose(logits(model), base, atol=1e-3)
    model(input_ids=TOKENS.to(DEVICE)).logits.sum().backward()
    assert all(p.grad is not None for p in trained_of(model))
    before = logits(model)
    with pytest.raises(SvdtuneError, match="slice of a fused quantized weight cannot be merged"):
        model.merge_adapter()
    assert torch.equal(logits(model), before)


def test_torchao_that_cannot_be_written_again():
    """Without its configuration, as in models put together by hand."""
    pytest.importorskip("torchao")
    model = torch.nn.Sequential(quantized(torch.nn.Linear(64, 32), "torchao")).to(DEVICE)
    model = get_peft_model(model, SorsaConfig(r=4, target_modules=["0"]))
    with pytest.raises(SvdtuneError, match=r"in a way that cannot be written again"):
        model.merge_adapter()
