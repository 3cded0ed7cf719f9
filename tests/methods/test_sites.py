"""One answer everywhere: what is found, counted, planned, started from disk and put on the loaded
model is the same."""

import dataclasses
import typing

import pytest
import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoraConfig,
    OSFConfig,
    PeftModel,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from transformers import AutoModelForCausalLM

from svdtune import MoSaraConfig, SaraConfig, SorsaConfig, SvdtuneError, SvdtuneWarning
from svdtune.checkpoint import open_checkpoint, open_shape
from svdtune.methods.mosara import reference as mosara
from svdtune.methods.sara import reference as sara
from svdtune.methods.settings import settings
from svdtune.methods.sites import count, sites
from svdtune.methods.sorsa import reference as sorsa
from svdtune.methods.start.disk import start
from svdtune.planning import plan
from tiny import tiny_gpt2, tiny_llama

METHODS = (SaraConfig, MoSaraConfig, SorsaConfig)
QV = ["q_proj", "v_proj"]
# For each setting that may change where an adapter goes or what it holds: values beside its
# default. A new setting of a method must stand here or in one of the next, or
# `test_every_setting_is_looked_at` fails.
VALUES = {
    "r": [3],
    "threshold": [0.3],
    "rank_pattern": [{"v_proj": 2}, {r"layers\.1.*": 5}],
    "target_modules": ["all-linear", r".*\.[02]\..*(q|o)_proj"],
    "exclude_modules": [["v_proj"]],
    "layers_to_transform": [[1]],
    "layers_pattern": ["layers"],
    "modules_to_save": [["norm"]],
    "bias": ["all", "{method}_only"],
    "fused_slices": ["auto", {"c_attn": ["k"]}],
    "compact": [True],
    "init": ["zero_v", "spectral"],
    "use_lambda": [False],
    "num_heads": [1, 3],
    "gate": ["none"],
    "use_v": [False],
    "v_position": ["front"],
    "init_weights": [False],
    "layout": [],
    "components": ["middle", "last", [1, 4]],
}
WITHOUT_SHAPES = {"task_type", "dropout", "gamma", "reduction", "smooth_eps"}
ELSEWHERE = {"target_parameters"}  # of models with experts: test_experts.py
# What another setting needs, and what a start from disk refuses.
WITH = {"layers_pattern": {"layers_to_transform": [0]}, "compact": {"init_weights": True}}
WHOLE_MODEL = ("modules_to_save", "bias")


def cases():
    for cls in METHODS:
        for field in settings(cls):
            for value in VALUES.get(field.name, []):
                if isinstance(value, str):
                    value = value.format(method=cls.method)
                yield pytest.param(cls, {field.name: value}, id=f"{cls.method} {field.name}={value}")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    llama = tiny_llama(num_hidden_layers=3, num_key_value_heads=2, vocab_size=64, attention_bias=True)
    llama.save_pretrained(folder / "llama")
    tiny_gpt2().save_pretrained(folder / "gpt2")
    return folder


def test_every_setting_is_looked_at():
    named = {field.name for cls in METHODS for field in settings(cls)}
    assert named == VALUES.keys() | WITHOUT_SHAPES | ELSEWHERE


@pytest.mark.parametrize(("cls", "options"), list(cases()))
def test_all_answers_agree(folders, tmp_path, cls, options):
    """Names, ranks and numbers, for every method and each of its settings."""
    (name,) = options
    kind, targets = ("gpt2", ["c_attn", "c_proj"]) if name == "fused_slices" else ("llama", QV)
    size = {} if name in ("r", "threshold") or isinstance(options.get("components"), list) else {"threshold": 0.25}
    config = cls(**{"target_modules": targets, **size, **WITH.get(name, {}), **options})
    folder = folders / kind
    model = AutoModelForCausalLM.from_pretrained(folder)
    checkpoint = open_checkpoint(folder)
    before = model.state_dict()

    found = sites(checkpoint, config)
    live = sites(model, config)
    made = plan(checkpoint, config)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())
    adapted = get_peft_model(model, dataclasses.replace(config))
    trained, total = adapted.get_nb_trainable_parameters()

    assert found.ranks == adapted.peft_config["default"].ranks
    assert found.count[::2] == count(checkpoint, config)[::2] == (trained, total)
    for other in (live, made.sites, sites(adapted)):
        assert (other.places, other.count) == (found.places, found.count)
    slices = {site.name: site.rows.as_list() for site in found if site.rows is not None}
    assert slices == adapted.peft_config["default"].slices
    frozen = sum(p.numel() for name, p in adapted.named_parameters() if ".frozen_" in name)
    assert found.count.frozen == sum(site.frozen for site in found) == frozen
    again = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), made.config)
    assert (again.peft_config["default"].ranks, again.get_nb_trainable_parameters()[0]) == (found.ranks, trained)

    if name in WHOLE_MODEL:
        with pytest.raises(SvdtuneError, match="modules_to_save and bias"):
            start(checkpoint, config, tmp_path / "adapter")
        return
    started = start(checkpoint, config, tmp_path / "adapter")
    assert (started.ranks, started.trained, started.frozen) == (found.ranks, *found.count[:2])
    base = AutoModelForCausalLM.from_pretrained(folder)
    loaded = sites(PeftModel.from_pretrained(base, started.adapter, is_trainable=True))
    assert set(loaded) == set(found)


OTHERS = {
    "lora": lambda: LoraConfig(r=3),
    "lora by pattern": lambda: LoraConfig(r=3, rank_pattern={"v_proj": 5}, bias="lora_only", target_modules=QV),
    "dora": lambda: LoraConfig(r=3, use_dora=True, target_modules="all-linear"),
    "pissa": lambda: LoraConfig(r=3, init_lora_weights="pissa", target_modules=QV),
    "lora on embeddings": lambda: LoraConfig(r=3, target_modules=["embed_tokens"]),
    "vera": lambda: VeraConfig(r=3, target_modules=["q_proj"]),
    "adalora": lambda: AdaLoraConfig(init_r=4, target_r=2, total_step=9, target_modules=QV),
    "ia3": lambda: IA3Config(target_modules=QV, feedforward_modules=[]),
    "replicated layers": lambda: LoraConfig(r=3, target_modules=QV, layer_replication=[(0, 3), (1, 3)]),
}


@pytest.mark.parametrize("config", OTHERS.values(), ids=OTHERS)
def test_every_method_of_peft_has_sites(folders, config):
    model = AutoModelForCausalLM.from_pretrained(folders / "llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = sites(open_checkpoint(folders / "llama"), config())
    live = sites(model, config())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    adapted = get_peft_model(model, config())
    for other in (live, sites(adapted)):
        assert (other.places, other.count) == (found.places, found.count)
    assert found.count[::2] == adapted.get_nb_trainable_parameters()
    shapes = {site.name: model.get_submodule(site.name).get_base_layer().weight.shape for site in found}
    assert {site.name: site.shape for site in found} == shapes


@pytest.mark.parametrize("module", ["embed_tokens", "lm_head"])
def test_a_trained_weight_that_stays_tied_counts_once(tmp_path, module):
    tiny_llama(tie_word_embeddings=True).save_pretrained(tmp_path)
    config = LoraConfig(r=2, target_modules=QV, modules_to_save=[module], ensure_weight_tying=True)
    found = count(open_checkpoint(tmp_path), dataclasses.replace(config))
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert count(model, dataclasses.replace(config)) == found
    assert found[::2] == get_peft_model(model, config).get_nb_trainable_parameters()


def test_a_method_that_has_none_of_the_layers_named(tmp_path):
    with pytest.raises(SvdtuneError, match=r"osf adapts none of the modules that target_modules = \['c_attn'\] names"):
        sites(tiny_gpt2(), OSFConfig(target_modules=["c_attn"]))


def test_a_method_that_adapts_no_module_has_numbers_alone(folders):
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    found = sites(AutoModelForCausalLM.from_pretrained(folders / "llama"), config)
    assert (len(found), found.count.trained) == (0, 5 * 32)


def test_a_model_without_an_adapter_trains_itself(folders):
    model = AutoModelForCausalLM.from_pretrained(folders / "llama")
    numbers = sum(parameter.numel() for parameter in model.parameters())
    assert count(model) == count(open_checkpoint(folders / "llama")) == (numbers, 0, numbers)
    assert sites(model).config is None


def test_a_model_that_has_an_adapter_already_is_refused(folders):
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(folders / "llama"), LoraConfig(r=2))
    with pytest.raises(SvdtuneError, match=r"has an adapter on it already; give the base model"):
        sites(adapted, SorsaConfig(r=2))


def test_a_shape_has_sites_but_no_spectrum():
    found = sites(open_shape("llama-7b", layers=1), SorsaConfig(r=8, target_modules="all-linear"))
    assert {site.shape for site in found} == {(4096, 4096), (11008, 4096), (4096, 11008)}
    with pytest.raises(SvdtuneError, match="llama-7b is a shape without weights"):
        sites(open_shape("llama-7b", layers=1), SaraConfig())


def test_keys_of_rank_pattern_that_no_site_has_are_named(folders):
    config = SaraConfig(r=2, target_modules=QV, rank_pattern={"nothing": 3})
    with pytest.warns(SvdtuneWarning, match=r"did not match any targeted module and were ignored: \['nothing'\]"):
        sites(open_checkpoint(folders / "llama"), config)


def test_what_svdtune_writes_is_no_setting():
    for cls in METHODS:
        hints = typing.get_type_hints(cls)
        written = {field.name for field in dataclasses.fields(cls) if field.metadata.get("written")}
        assert written.isdisjoint(field.name for field in settings(cls))
        assert written <= hints.keys()
        empty = cls()
        assert not any(getattr(empty, name) for name in written)


@pytest.mark.parametrize(
    ("config", "formula"),
    [
        (SaraConfig(r=3), sara.trainable_parameters),
        (SaraConfig(r=3, use_lambda=False), lambda k, i, o: sara.trainable_parameters(k, i, o, use_lambda=False)),
        (SorsaConfig(r=3), sorsa.trainable_parameters),
        (MoSaraConfig(r=3), mosara.trainable_parameters),
        (MoSaraConfig(r=3, num_heads=1), lambda k, i, o: mosara.trainable_parameters(k, i, o, num_heads=1)),
    ],
    ids=["sara", "sara without lambda", "sorsa", "mosara", "mosara with one head"],
)
def test_the_papers_formulas_count_what_is_found(folders, config, formula):
    config.target_modules = set(QV)
    for site in sites(open_checkpoint(folders / "llama"), config):
        out, inside = site.shape
        assert site.trained == formula(site.rank, inside, out)
