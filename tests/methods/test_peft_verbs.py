"""What PEFT users do with an adapter, for every method, setting and model family: all of it works
as for LoRA."""

import copy

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    PeftModel,
    convert_to_lora,
    get_peft_model,
    set_peft_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import LlamaForCausalLM

from svdtune import MoSaraConfig, SaraConfig, SorsaConfig, SvdtuneError
from tiny import tiny_gpt2, tiny_llama

CONFIGS = {
    "sara": (SaraConfig, {"threshold": 0.2}),
    "sara-spectral": (SaraConfig, {"r": 3, "init": "spectral"}),
    "sara-zero_v": (SaraConfig, {"r": 3, "init": "zero_v", "use_lambda": False}),
    "mosara": (MoSaraConfig, {"threshold": 0.5, "num_heads": 3}),
    "mosara-one-head": (MoSaraConfig, {"r": 5, "num_heads": 1}),
    "mosara-front": (MoSaraConfig, {"r": 5, "num_heads": 2, "v_position": "front"}),
    "mosara-without-v": (MoSaraConfig, {"r": 5, "num_heads": 2, "use_v": False}),
    "sorsa": (SorsaConfig, {"r": 4}),
    "sorsa-threshold": (SorsaConfig, {"threshold": 0.3}),
}
UNCHANGED_AT_START = {
    "sara-spectral",
    "sara-zero_v",
    "mosara",
    "mosara-one-head",
    "mosara-front",
    "sorsa",
    "sorsa-threshold",
}
MERGEABLE = set(CONFIGS) - {"mosara", "mosara-front", "mosara-without-v"}
FAMILIES = ["llama", "gpt2"]


def model_of(family: str, dtype=torch.float32, depth: int = 2):
    if family == "gpt2":
        return tiny_gpt2(n_layer=depth).to(dtype)
    return tiny_llama(num_hidden_layers=depth, num_key_value_heads=2, tie_word_embeddings=False).to(dtype)


def config_of(name: str, **settings):
    cls, own = CONFIGS[name]
    return cls(**(own | settings), task_type="CAUSAL_LM")


def adapted(name: str, family: str = "llama", dtype=torch.float32, moved: float = 0.0, depth: int = 2, **settings):
    model = get_peft_model(model_of(family, dtype, depth), config_of(name, **settings)).eval()
    return move(model, moved)


def move(model, size: float, seed: int = 1):
    """Change every trained parameter, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += size * torch.randn(parameter.shape, generator=generator).to(parameter)
    return model


TOKENS = torch.arange(1, 25).view(2, 12)


@torch.no_grad()
def logits(model):
    return model(input_ids=TOKENS).logits


def layers(model):
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", CONFIGS)
class TestEveryMethod:
    def test_start(self, name, family):
        base = logits(model_of(family))
        got = logits(adapted(name, family))
        if name in UNCHANGED_AT_START:
            assert torch.equal(got, base)
        else:
            assert not torch.equal(got, base)

    def test_disabling_gives_the_base_model_back(self, name, family):
        base = logits(model_of(family))
        model = adapted(name, family, moved=0.1)
        assert not torch.allclose(logits(model), base, atol=1e-3)
        with model.disable_adapter():
            got = logits(model)
        assert torch.equal(got, base)

    def test_unloading_gives_the_base_weights_back(self, name, family):
        base = model_of(family).state_dict()
        got = adapted(name, family, moved=0.1).unload().state_dict()
        assert got.keys() == base.keys()
        for key, value in base.items():
            assert torch.equal(got[key], value), key

    def test_merging(self, name, family):
        model = adapted(name, family, moved=0.1)
        before, weights = logits(model), {k: v.clone() for k, v in model.state_dict().items()}
        if name not in MERGEABLE:
            for merge in (model.merge_and_unload, model.merge_adapter):
                with pytest.raises(SvdtuneError, match=r"heads, which cannot be merged.*num_heads=1"):
                    merge()
            assert torch.equal(logits(model), before)
            return
        model.merge_adapter()
        assert torch.allclose(logits(model), before, atol=1e-4)
        model.unmerge_adapter()
        assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
        merged = model.merge_and_unload(safe_merge=True)
        assert not layers(merged)
        assert torch.allclose(logits(merged), before, atol=1e-4)

    def test_a_step_trains_what_should_be_trained(self, name, family):
        model = adapted(name, family, moved=0.1)
        frozen = {key: p.detach().clone() for key, p in model.named_parameters() if not p.requires_grad}
        trained = {key: p.detach().clone() for key, p in model.named_parameters() if p.requires_grad}
        prefix = model.base_model.prefix
        assert all(f".{prefix}" in key for key in trained)
        assert not any(f".{prefix}" in key for key in frozen)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
        for key, parameter in model.named_parameters():
            if key in frozen:
                assert parameter.grad is None
                assert torch.equal(parameter, frozen[key]), key
            else:
                assert not torch.equal(parameter, trained[key]), key

    def test_save_and_load(self, name, family, tmp_path, monkeypatch):
        model = adapted(name, family, moved=0.1)
        model.save_pretrained(tmp_path)
        # loading decides no rank and decomposes nothing
        monkeypatch.setattr("torch.linalg.svd", None)
        monkeypatch.setattr("svdtune.spectra.ranks", None)
        monkeypatch.setattr("svdtune.spectra.factors", None)
        for low_cpu_mem_usage in (False, True):
            loaded = PeftModel.from_pretrained(model_of(family), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
            assert torch.equal(logits(loaded), logits(model))
            assert loaded.peft_config["default"].ranks == model.peft_config["default"].ranks

    def test_two_adapters(self, name, family):
        base = logits(model_of(family))
        model = adapted(name, family, moved=0.1)
        first = logits(model)
        model.add_adapter("second", config_of(name))
        assert torch.allclose(logits(model), first, atol=1e-6)
        model.set_adapter("second")
        move(model, 0.2, seed=2)
        second = logits(model)
        assert not torch.allclose(second, first, atol=1e-3)
        model.set_adapter("default")
        assert torch.equal(logits(model), first)
        with model.disable_adapter():
            assert torch.equal(logits(model), base)
        model.delete_adapter("second")
        assert torch.equal(logits(model), first)
        assert all(set(layer.r) == {"default"} for layer in layers(model))

    def test_the_ranks_are_recorded(self, name, family):
        model = adapted(name, family)
        recorded = model.peft_config["default"].ranks
        found = {
            key: m.r["default"] for key, m in model.base_model.model.named_modules() if isinstance(m, BaseTunerLayer)
        }
        assert recorded == found
        assert found


@pytest.mark.parametrize("name", ["sara", "sara-spectral", "mosara-one-head", "sorsa"])
def test_the_general_path_equals_the_fused_one(name):
    """Layers that must call their base (here: it has a hook) give the same outputs and
    gradients."""
    fused, general = adapted(name, moved=0.1), adapted(name, moved=0.1)
    for layer in layers(general):
        layer.get_base_layer().register_forward_hook(lambda *_: None)
        assert not layer._may_read_weight()
    assert all(layer._may_read_weight() for layer in layers(fused))
    assert torch.allclose(logits(fused), logits(general), atol=1e-5)
    for model in (fused, general):
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    for one, other in zip(fused.parameters(), general.parameters(), strict=True):
        if one.grad is not None:
            assert torch.allclose(one.grad, other.grad, atol=1e-5)


@pytest.mark.parametrize("name", ["sara", "mosara", "sorsa"])
def test_dropout_acts_in_training_alone(name):
    model = adapted(name, moved=0.1, dropout=0.5)
    assert torch.equal(logits(model), logits(adapted(name, moved=0.1)))
    model.train()
    assert not torch.equal(logits(model), logits(model))
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", ["sara", "mosara", "sorsa"])
def test_factors_stay_fp32_and_orthonormal_on_a_bf16_base(name):
    model = adapted(name, dtype=torch.bfloat16)
    for layer in layers(model):
        for part in (*layer.trained, *layer.frozen):
            assert all(tensor.dtype == torch.float32 for tensor in getattr(layer, part).values())
        for part in ("sorsa_U", "sorsa_V", "frozen_U", "frozen_V"):
            for factor in getattr(layer, part, {}).values():
                gram = factor.detach().double().mT @ factor.detach().double()
                assert float((gram - torch.eye(len(gram))).abs().max()) < 1e-6


def test_autocast_adapter_dtype_false_casts_the_trained_factors():
    model = get_peft_model(model_of("llama", torch.bfloat16), config_of("sorsa"), autocast_adapter_dtype=False)
    dtypes = {p.dtype for p in model.parameters() if p.requires_grad}
    assert dtypes == {torch.bfloat16}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["sara", "mosara-one-head", "sorsa"])
def test_factors_in_the_base_dtype_compute_and_merge(name, dtype):
    model = get_peft_model(model_of("llama", dtype), config_of(name), autocast_adapter_dtype=False)
    before = logits(move(model.eval(), 0.01))
    got = logits(model.merge_and_unload())
    assert float((got - before).float().norm() / before.float().norm()) < 0.02


@pytest.mark.parametrize("name", ["mosara", "mosara-front", "sara", "sorsa"])
def test_factors_in_the_base_dtype_train(name):
    model = get_peft_model(model_of("llama", torch.bfloat16), config_of(name), autocast_adapter_dtype=False)
    move(model, 0.01)(input_ids=TOKENS, labels=TOKENS).loss.backward()
    assert all(p.grad.dtype == torch.bfloat16 for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", sorted(MERGEABLE))
def test_pefts_own_conversion_to_lora(name, family):
    """It decomposes `get_delta_weight`, which must lie as the base layer stores it, against the
    base's own weight."""
    model = adapted(name, family, moved=0.1)
    config, tensors = convert_to_lora(model, rank=16)
    config.fan_in_fan_out = family == "gpt2"
    converted = get_peft_model(model_of(family), config).eval()
    set_peft_model_state_dict(converted, tensors)
    assert torch.allclose(logits(converted), logits(model), atol=1e-3)


def test_attributes_of_the_base_model_are_reached_through_the_tuner():
    """A name that the tuner itself uses would hide the base model's, such as the `layers` of many
    models."""
    model = model_of("llama").model
    adapted_model = get_peft_model(model, SorsaConfig(r=4))
    assert adapted_model.base_model.layers is model.layers


@pytest.mark.parametrize("name", CONFIGS)
def test_a_base_on_disk_comes_back_through_auto_classes(name, tmp_path):
    model_of("llama").save_pretrained(tmp_path / "base")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    model = move(get_peft_model(base, config_of(name)), 0.1).eval()
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert torch.equal(logits(loaded), logits(model))


def test_default_targets_are_the_papers():
    for name, expected in (("sara", {"q_proj", "v_proj"}), ("mosara", {"q_proj", "v_proj"})):
        assert {key.rsplit(".")[-1] for key in adapted(name).peft_config["default"].ranks} == expected
    every = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert {key.rsplit(".")[-1] for key in adapted("sorsa").peft_config["default"].ranks} == every


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        ({"target_modules": ["q_proj"], "layers_to_transform": [1]}, 1),
        ({"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": "layers"}, 1),
        ({"target_modules": "all-linear", "exclude_modules": ["down_proj"]}, 12),
        ({"target_modules": r".*\.1\..*_proj"}, 7),
        ({"layers_to_transform": [0]}, 7),
        ({"target_modules": "all-linear", "layers_to_transform": 1, "layers_pattern": "layers"}, 7),
        ({"target_modules": "all-linear", "layers_to_transform": [0, 1], "exclude_modules": ["up_proj"]}, 12),
    ],
)
def test_targeting(settings, count):
    assert len(adapted("sorsa", **settings).peft_config["default"].ranks) == count


def test_rank_pattern_goes_before_r_and_threshold():
    ranks = adapted("sara", rank_pattern={r"layers\.0\..*": 7}).peft_config["default"].ranks
    assert {rank for key, rank in ranks.items() if ".0." in key} == {7}
    assert {rank for key, rank in ranks.items() if ".1." in key} != {7}


def test_modules_to_save_and_bias():
    model = adapted("sara", "gpt2", modules_to_save=["ln_f"], bias="sara_only")
    trained = {key for key, p in model.named_parameters() if p.requires_grad}
    assert any("ln_f.modules_to_save" in key for key in trained)
    assert any(key.endswith("c_attn.base_layer.bias") for key in trained)
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    bias = model.base_model.model.transformer.h[0].attn.c_attn.base_layer.bias
    assert bias.grad is not None
    assert bias.grad.any()


def test_random_start_for_tests_changes_the_outputs():
    for name in ("sara", "mosara", "sorsa"):
        assert not torch.allclose(logits(adapted(name, init_weights=False)), logits(model_of("llama")), atol=1e-4)


def test_one_configuration_serves_two_models():
    """Nothing that was resolved for the first model reaches the second."""
    config = config_of("sara")
    first = get_peft_model(model_of("llama"), config)
    other = model_of("llama")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.copy_(torch.ones_like(parameter))  # rank 1 everywhere
    ranks = get_peft_model(other, config).peft_config["default"].ranks
    assert set(ranks.values()) == {1}
    assert first.base_model.model.model.layers[0].self_attn.q_proj.r["default"] > 1


def test_a_rank_deficient_and_a_zero_weight_can_be_adapted():
    for name in ("sara", "mosara", "sorsa"):
        model = model_of("llama")
        with torch.no_grad():
            model.model.layers[0].self_attn.q_proj.weight.zero_()
            model.model.layers[1].self_attn.v_proj.weight[1:] = 0
        base = logits(model)
        adapted_model = get_peft_model(model, config_of(name)).eval()
        got = logits(adapted_model)
        assert torch.isfinite(got).all()
        if name in UNCHANGED_AT_START:
            assert torch.equal(got, base)


def test_copies_are_independent():
    model = adapted("sorsa", moved=0.1)
    before = logits(model)
    twin = copy.deepcopy(model)
    move(twin, 0.5)
    assert torch.equal(logits(model), before)
    assert not torch.allclose(logits(twin), before, atol=1e-3)


def test_resuming_an_adapter_in_place(tmp_path):
    """Loading an adapter's file over itself, as Trainer does on resume, changes nothing."""
    for name in CONFIGS:
        model = adapted(name, moved=0.1)
        before = logits(model)
        model.save_pretrained(tmp_path / name)
        model.load_adapter(tmp_path / name, "default", is_trainable=True)
        assert torch.equal(logits(model.eval()), before)
