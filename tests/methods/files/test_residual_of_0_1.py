"""Adapters that version 0.1 wrote with layout="residual": read as delta, the same function on a
base that stays as it is.

The folders are written here as 0.1 wrote them, the configuration word for word. In memory its base
weight was W − P₀ V₀ᵀ, rounded to the weight's dtype; the adapter added W_p.
"""

import hashlib
import json
import warnings
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from svdtune import MoSaraConfig, SaraConfig, SorsaConfig, SvdtuneError
from svdtune.export.lora import combine, export_lora
from svdtune.export.merge_checkpoint import merge
from svdtune.export.source import find_source
from svdtune.linalg import top_factors
from svdtune.methods.files.compact import probe
from svdtune.methods.files.integrity import weight_fingerprint
from tiny import tiny_gpt2, tiny_llama

SAYS = r"layout='residual', which svdtune 0\.1 wrote, is read as layout='delta'"
TOKENS = torch.arange(1, 25).view(2, 12)
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 1e-2}
R = 4


def model_of(kind: str, dtype=torch.float32):
    return (tiny_gpt2() if kind == "gpt2" else tiny_llama(num_key_value_heads=2)).to(dtype).eval()


def adapted_weights(model) -> dict[str, torch.Tensor]:
    """The weights [out, in] of the layers that the folders below adapt, by name."""
    if model.config.model_type == "gpt2":  # slices q and v of Conv1D weights, which lie transposed
        weights = {
            f"transformer.h.{i}.attn.c_attn": block.attn.c_attn.weight for i, block in enumerate(model.transformer.h)
        }
        parts = {"q": slice(0, 32), "v": slice(64, 96)}
        return {f"{name}.{part}": w.detach().mT[rows] for name, w in weights.items() for part, rows in parts.items()}
    names = (f"model.layers.{i}.{part}" for i in (0, 1) for part in ("self_attn.q_proj", "mlp.down_proj"))
    return {name: model.get_submodule(name).weight.detach() for name in names}


def written_by_0_1(folder: Path, model, compact: bool = False) -> dict[str, dict[str, torch.Tensor]]:
    """Write an adapter that has been trained, and return its tensors by layer."""
    folder.mkdir(parents=True)
    weights = adapted_weights(model)
    generator = torch.Generator().manual_seed(1)
    layers, tensors = {}, {}
    for name, weight in weights.items():
        factors = top_factors(weight, R, exact=compact)
        start = {"sorsa_U": factors.U, "sorsa_s": factors.s, "sorsa_V": factors.Vh.mT.contiguous()}
        frozen = {"frozen_P0": factors.U * factors.s, "frozen_V0": factors.Vh.mT.contiguous()}
        moved = {part: t + 0.4 * torch.randn(t.shape, generator=generator) for part, t in start.items()}
        layers[name] = moved | frozen
        kept = {f"{part}_probe": probe(t) for part, t in frozen.items()} if compact else frozen
        tensors |= {f"base_model.model.{name}.{part}": t for part, t in (moved | kept).items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    gpt2 = model.config.model_type == "gpt2"
    modules = sorted({name.rpartition(".")[0] for name in weights} if gpt2 else weights)
    spans = {"q": [1, 96, 0, 32], "v": [1, 96, 64, 96]}
    config = {
        "auto_mapping": None,
        "base_fingerprint": {name: weight_fingerprint(weight) for name, weight in weights.items()},
        "base_model_name_or_path": model.name_or_path or None,
        "bias": "none",
        "compact": compact,
        "dropout": 0.0,
        "exclude_modules": None,
        "fused_slices": {"c_attn": ["q", "v"]} if gpt2 else None,
        "gamma": 0.0004,
        "inference_mode": True,
        "init_weights": True,
        "initialized": True,
        "kernels": {},
        "layers_pattern": None,
        "layers_to_transform": None,
        "layout": "residual",
        "modules_to_save": None,
        "peft_type": "SORSA",
        "peft_version": "0.21.0",
        "r": R,
        "rank_pattern": {},
        "ranks": dict.fromkeys(weights, R),
        "reduction": "mean",
        "revision": None,
        "slices": {name: spans[name[-1]] for name in weights} if gpt2 else {},
        "smooth_eps": 0.0,
        "svdtune_version": "0.1.0",
        "target_modules": modules,
        "task_type": "CAUSAL_LM",
        "threshold": None,
        "weights_sha256": hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest(),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True))
    return layers


@torch.no_grad()
def as_0_1_computed(model, layers: dict[str, dict[str, torch.Tensor]]) -> torch.Tensor:
    """Logits with W − P₀ V₀ᵀ, rounded to the weight's dtype, in place of each weight, and W_p added
    to what it gives."""
    for name, weight in adapted_weights(model).items():
        t = {part: tensor.double() for part, tensor in layers[name].items()}
        residual = (weight.double() - t["frozen_P0"] @ t["frozen_V0"].mT).to(weight.dtype).double()
        weight.copy_(residual + t["sorsa_U"] * t["sorsa_s"] @ t["sorsa_V"].mT)
    return logits(model)


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=TOKENS).logits


@pytest.mark.parametrize("compact", [False, True], ids=["whole", "compact"])
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
class TestItLoads:
    def test_to_the_same_function_on_an_untouched_base(self, kind, dtype, compact, tmp_path):
        layers = written_by_0_1(tmp_path / "old", model_of(kind, dtype), compact)
        want = as_0_1_computed(model_of(kind, dtype), layers)
        base = logits(model_of(kind, dtype))
        for low_cpu_mem_usage in (False, True):
            before = model_of(kind, dtype)
            weights = {name: tensor.clone() for name, tensor in before.state_dict().items()}
            with pytest.warns(UserWarning, match=SAYS) as said:
                model = PeftModel.from_pretrained(before, tmp_path / "old", low_cpu_mem_usage=low_cpu_mem_usage)
            assert sum(warning.category is UserWarning for warning in said) == 1
            assert model.peft_config["default"].layout == "delta"
            got = logits(model)
            assert float((got - want).norm() / want.norm()) < ROUNDING[dtype]
            assert float((base - want).norm() / want.norm()) > 5 * ROUNDING[dtype]
            with model.disable_adapter():
                assert torch.equal(logits(model), base)
            left = model.unload().state_dict()
            assert all(torch.equal(left[name], tensor) for name, tensor in weights.items())

    def test_as_the_delta_adapter_with_its_tensors(self, kind, dtype, compact, tmp_path):
        """Bit for bit; and it is saved as one."""
        written_by_0_1(tmp_path / "old", model_of(kind, dtype), compact)
        with pytest.warns(UserWarning, match=SAYS):
            model = PeftModel.from_pretrained(model_of(kind, dtype), tmp_path / "old")
        model.save_pretrained(tmp_path / "new")
        assert json.loads((tmp_path / "new" / "adapter_config.json").read_text())["layout"] == "delta"
        old, new = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("old", "new"))
        assert old.keys() == new.keys()
        assert all(torch.equal(old[name], new[name]) for name in old)
        loaded = PeftModel.from_pretrained(model_of(kind, dtype), tmp_path / "new")
        assert torch.equal(logits(loaded), logits(model))


class TestVerbs:
    @pytest.fixture
    def old(self, tiny_folder, tmp_path):
        from transformers import AutoModelForCausalLM

        written_by_0_1(tmp_path / "old", AutoModelForCausalLM.from_pretrained(tiny_folder))
        return tmp_path / "old"

    def test_auto_classes_and_merging(self, old, tiny_folder, tmp_path):
        with pytest.warns(UserWarning, match=SAYS):
            model = AutoPeftModelForCausalLM.from_pretrained(old)
        with pytest.warns(UserWarning, match=SAYS):
            report = merge(find_source(old), tmp_path / "merged", check=True)
        assert report.layers == 4
        assert report.comparison.relative < 1e-4 * report.comparison.effect + 2e-6
        merged = type(model.get_base_model()).from_pretrained(tmp_path / "merged")
        torch.testing.assert_close(logits(merged), logits(model), rtol=1e-4, atol=1e-5)

    def test_export_and_combination(self, old, tiny_folder, tmp_path):
        with pytest.warns(UserWarning, match=SAYS):
            want = logits(AutoPeftModelForCausalLM.from_pretrained(old))
        with pytest.warns(UserWarning, match=SAYS):
            assert set(export_lora(old, tmp_path / "lora").ranks.values()) == {2 * R}
        with pytest.warns(UserWarning, match=SAYS):
            combine({old: 1.0}, tmp_path / "combined")
        for name in ("lora", "combined"):
            loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / name)
            torch.testing.assert_close(logits(loaded), want, rtol=1e-4, atol=1e-5)

    def test_training_goes_on(self, old, tiny_folder):
        with pytest.warns(UserWarning, match=SAYS):
            model = AutoPeftModelForCausalLM.from_pretrained(old, is_trainable=True)
        before = logits(model)
        model.load_adapter(old, "default", is_trainable=True)  # as Trainer does on resume
        assert torch.equal(logits(model), before)
        model.train()(input_ids=TOKENS, labels=TOKENS).loss.backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_a_new_adapter_is_refused_with_the_ways_there_are():
    with pytest.raises(SvdtuneError, match=r"layout='residual' changed the base .*layout='delta'.*split_checkpoint"):
        SorsaConfig(layout="residual")


def test_nothing_is_said_of_other_adapters(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for number, config in enumerate((SorsaConfig(r=2), SaraConfig(r=2), MoSaraConfig(r=2))):
            get_peft_model(model_of("llama"), config).save_pretrained(tmp_path / str(number))
            PeftModel.from_pretrained(model_of("llama"), tmp_path / str(number))
