"""Fused experts: a rank and factors for each expert of a parameter, against the literal form; and
those that are left out are said."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from torch.func import functional_call
from transformers import AutoModelForCausalLM

from pairwise import all_pairs
from svdtune import MoSaraConfig, SaraConfig, SorsaConfig, SvdtuneError, plan, sites
from svdtune.checkpoint import open_checkpoint
from svdtune.export import Source, merge
from svdtune.export.lora import export_lora
from svdtune.linalg import rank_at_threshold
from svdtune.methods.sorsa.reference import orthonormal_regularizer
from svdtune.methods.sorsa.regularizer import add_regularizer_gradients
from svdtune.methods.start.disk import start
from svdtune.planning import by_depth
from tiny import EXPERTS, tiny_experts

CONFIGS = {"sara": SaraConfig, "mosara": MoSaraConfig, "sorsa": SorsaConfig}
BOTH = ["experts.gate_up_proj", "experts.down_proj"]
TOKENS = torch.arange(1, 25).view(2, 12)
OPTIONS = {
    "sara": {"r": 2},
    "sara-spectral": {"threshold": 0.4, "init": "spectral"},
    "sara-no-lambda": {"threshold": 0.4, "use_lambda": False},
    "sorsa": {"r": 2},
    "sorsa-threshold": {"threshold": 0.4},
    "sorsa-last": {"r": 3, "components": "last"},
}


def config_of(name: str, **own):
    return CONFIGS[name.partition("-")[0]](**{"target_parameters": BOTH} | OPTIONS[name] | own)


def base_of(kind: str, dtype: torch.dtype):
    """The model; in float64 its experts are computed one by one, for grouped products have none."""
    model = tiny_experts(kind)
    if dtype == torch.float64:
        model.set_experts_implementation("eager")
    return model.to(dtype)


def made(kind: str, name: str, dtype=torch.float32, **own) -> PeftModel:
    return get_peft_model(base_of(kind, dtype), config_of(name, **own)).eval()


def moved(model: PeftModel) -> PeftModel:
    """The model with every trained factor away from where it starts."""
    with torch.no_grad():
        trained = (p for name, p in model.named_parameters() if "sorsa_" in name or "sara_" in name)
        for at, parameter in enumerate(trained):
            parameter += 0.1 * torch.arange(parameter.numel()).view_as(parameter).add(at).sin()
    return model


def stacks(model: nn.Module, kind: str) -> dict[str, torch.Tensor]:
    """The parameters of the experts as [experts, out, in], by their last name."""
    found = {name: p for name, p in model.named_parameters() if name.endswith(("gate_up_proj", "down_proj"))}
    return {name.rpartition(".")[2]: p.mT if kind == "gpt_oss" else p for name, p in found.items()}


@pytest.mark.parametrize(
    ("kind", "name", "dtype"), all_pairs(list(EXPERTS), list(OPTIONS), [torch.float32, torch.float64]), ids=str
)
def test_outputs_and_gradients_are_those_of_the_literal_form(kind, name, dtype):
    """ΔW of every expert is formed by itself and added to its matrix; autograd does the rest."""
    model = moved(made(kind, name, dtype))
    model(TOKENS, labels=TOKENS).loss.backward()
    factors = {key: p.detach().to(dtype).requires_grad_(p.requires_grad) for key, p in model.named_parameters()
               if key.endswith(".default")}  # fmt: skip
    base = base_of(kind, dtype)
    changed = {}
    for key, parameter in base.named_parameters():
        if not key.endswith(tuple(BOTH)):
            continue
        matrices = parameter.mT if kind == "gpt_oss" else parameter
        summed = []
        for index, matrix in enumerate(matrices.detach()):
            at = f"base_model.model.{key}.{index}"
            own = {part.removeprefix(f"{at}.").removesuffix(".default"): t for part, t in factors.items()
                   if part.startswith(f"{at}.")}  # fmt: skip
            if "sorsa_U" in own:
                delta = (
                    own["sorsa_U"] @ torch.diag(own["sorsa_s"]) @ own["sorsa_V"].mT
                    - own["frozen_P0"] @ own["frozen_V0"].mT
                )
            else:
                delta = own["sara_U"] * own.get("sara_lambda", 1) @ own["sara_V"].mT
            summed.append(matrix + delta)
        whole = torch.stack(summed)
        changed[key] = whole.mT if kind == "gpt_oss" else whole
    assert len(changed) == 2
    wanted = functional_call(base, changed, (TOKENS,), {"labels": TOKENS})
    wanted.loss.backward()
    torch.testing.assert_close(model(TOKENS).logits, wanted.logits.detach(), rtol=1e-4, atol=1e-5)
    trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
    assert trained
    for key, parameter in trained.items():
        torch.testing.assert_close(parameter.grad.to(dtype), factors[key].grad, rtol=1e-3, atol=1e-6, msg=key)


@pytest.mark.parametrize("kind", EXPERTS)
def test_ranks_and_starts_are_each_experts_own(kind):
    base = stacks(tiny_experts(kind), kind)
    model = made(kind, "sorsa-threshold", rank_pattern={"experts.down_proj": 3, r"down_proj\.1": 4})
    ranks = model.peft_config["default"].ranks
    spectra = {index: torch.linalg.svdvals(W.double()) for index, W in enumerate(base["gate_up_proj"])}
    found = [ranks[f"model.layers.0.mlp.experts.gate_up_proj.{index}"] for index in spectra]
    assert found == [rank_at_threshold(s, 0.4) for s in spectra.values()]
    assert len(set(found)) == 3
    assert [ranks[f"model.layers.0.mlp.experts.down_proj.{index}"] for index in range(3)] == [3, 4, 3]
    for index, W in enumerate(base["gate_up_proj"]):
        U, s, Vh = torch.linalg.svd(W)
        layer = model.get_submodule(f"base_model.model.model.layers.0.mlp.experts.gate_up_proj.{index}")
        k = found[index]
        start = layer.frozen_P0["default"] @ layer.frozen_V0["default"].mT
        torch.testing.assert_close(start, U[:, :k] * s[:k] @ Vh[:k], rtol=1e-4, atol=1e-5)
    assert torch.equal(model(TOKENS).logits, tiny_experts(kind)(TOKENS).logits)


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "name", "dtype"), all_pairs(list(EXPERTS), ["sara", "sorsa"], [torch.float32, torch.bfloat16]), ids=str
)
def test_merging_gives_what_the_adapter_gave_and_takes_it_back(kind, name, dtype):
    model = moved(made(kind, name, dtype))
    before = {key: value.clone() for key, value in tiny_experts(kind).to(dtype).state_dict().items()}
    after = model(TOKENS).logits
    model.merge_adapter(safe_merge=True)
    close = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.1, "atol": 0.1}
    torch.testing.assert_close(model(TOKENS).logits, after, **close)
    with model.disable_adapter():  # which unmerges
        assert torch.equal(model(TOKENS).logits, tiny_experts(kind).to(dtype)(TOKENS).logits)
    assert torch.equal(model(TOKENS).logits, after)
    merged = model.merge_and_unload()
    assert merged.state_dict().keys() == before.keys()
    assert type(merged.model.layers[0].mlp.experts) is type(tiny_experts(kind).model.layers[0].mlp.experts)
    torch.testing.assert_close(merged(TOKENS).logits, after, **close)
    assert all(torch.equal(value, before[key]) for key, value in merged.state_dict().items() if "experts" not in key)


@torch.no_grad()
def test_two_adapters_add_up_and_each_loads_alone(tmp_path):
    model = made("mixtral", "sorsa", target_modules=["q_proj"])
    model.add_adapter("other", config_of("sorsa-threshold", target_parameters=BOTH[:1]))
    moved(model)
    one = model(TOKENS).logits
    model.base_model.set_adapter(["default", "other"])
    both = model(TOKENS).logits
    model.set_adapter("other")
    other = model(TOKENS).logits
    assert not torch.equal(one, both)
    assert not torch.equal(other, both)
    model.save_pretrained(tmp_path)
    for name, wanted in (("", one), ("other", other)):
        loaded = PeftModel.from_pretrained(tiny_experts("mixtral"), tmp_path / name).eval()
        assert torch.equal(loaded(TOKENS).logits, wanted)
    again = tiny_experts("mixtral")  # by Transformers' own way
    again.load_adapter(str(tmp_path))
    assert torch.equal(again(TOKENS).logits, one)


def test_a_compact_adapter_comes_back(tmp_path):
    model = moved(made("gpt_oss", "sorsa", compact=True))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_experts("gpt_oss"), tmp_path).eval()
    assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)
    with pytest.raises(SvdtuneError, match="made from another base model"):
        PeftModel.from_pretrained(tiny_experts("gpt_oss", head_dim=4), tmp_path)


def test_the_regularizer_is_that_of_all_experts():
    model = moved(made("qwen3_moe", "sorsa"))
    factors = {key: p for key, p in model.named_parameters() if key.endswith(("sorsa_U.default", "sorsa_V.default"))}
    add_regularizer_gradients(model, 1e-2)
    copies = {key: p.detach().clone().requires_grad_() for key, p in factors.items()}
    pairs = [(copies[key], copies[key.replace("sorsa_U", "sorsa_V")]) for key in copies if "sorsa_U" in key]
    gamma = model.peft_config["default"].gamma
    (gamma / 1e-2 * sum(orthonormal_regularizer(U, V) for U, V in pairs) / (2 * len(pairs))).backward()
    assert len(pairs) == 6
    for key, parameter in factors.items():
        torch.testing.assert_close(parameter.grad, copies[key].grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", EXPERTS)
def test_a_plan_says_what_is_put_on(kind):
    model, config = tiny_experts(kind), config_of("sara", target_modules=["q_proj"])
    for size in ({}, {"threshold": 0.3}, {"budget": 500}, {"match_lora": 2}):
        planned = plan(model, replace(config, **({"r": None} if size else {})), **size)
        adapted = get_peft_model(tiny_experts(kind), replace(planned.config))
        assert (planned.trained, planned.sites.count.total) == adapted.get_nb_trainable_parameters()
        assert planned.sites.ranks == adapted.peft_config["default"].ranks
        assert [site.expert for site in planned.sites] == [False] + [True] * 6
    lora = LoraConfig(**planned.lora_section())
    of_lora = get_peft_model(tiny_experts(kind), lora).get_nb_trainable_parameters()[0]
    assert (
        planned.trained
        <= sites(model, LoraConfig(r=2, target_modules=["q_proj"], target_parameters=BOTH)).count.trained
    )
    assert of_lora >= planned.trained - len(planned.sites) * max(planned.sites.ranks.values())


def saved(folder: Path, tokenizer, kind: str, **changes) -> Path:
    """A folder with the model and the tokenizer."""
    tokens = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    tiny_experts(kind, vocab_size=len(tokenizer), **tokens, **changes).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("kind", "dtype"), [("qwen3_moe", "auto"), ("gpt_oss", "bfloat16")])
def test_a_checkpoint_is_merged_in_the_form_of_its_base(kind, dtype, tiny_tokenizer, tmp_path):
    folder = saved(tmp_path / "model", tiny_tokenizer, kind)
    base = AutoModelForCausalLM.from_pretrained(folder)
    moved(get_peft_model(base, config_of("sorsa", target_modules=["q_proj"]))).save_pretrained(tmp_path / "adapter")
    report = merge(Source(str(folder), tmp_path / "adapter"), tmp_path / "merged", check=True, dtype=dtype)
    assert report.layers == 3
    assert report.comparison.effect > 10 * report.comparison.relative
    before, after = (load_file(each / "model.safetensors") for each in (folder, tmp_path / "merged"))
    assert {name: tensor.shape for name, tensor in before.items()} == {
        name: tensor.shape for name, tensor in after.items()
    }
    assert {tensor.dtype for tensor in after.values()} == {torch.float32 if dtype == "auto" else torch.bfloat16}


@pytest.mark.filterwarnings(
    "ignore:Model has `tie_word_embeddings=True`",
    "ignore:Setting `save_embedding_layers`",
    "ignore:Input and output embeddings are no longer tied",
)
@torch.no_grad()
@pytest.mark.parametrize("method", ["sara", "sorsa"])
@pytest.mark.parametrize(
    "settings", [{"target_modules": ["lm_head"]}, {"modules_to_save": ["lm_head"]}, {}], ids=["adapted", "saved", "not"]
)
def test_a_merge_says_whether_embeddings_are_still_tied(method, settings, tiny_tokenizer, tmp_path):
    folder = saved(tmp_path / "model", tiny_tokenizer, "mixtral", tie_word_embeddings=True)
    model = moved(get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config_of(method, **settings))).eval()
    for parameter in (p for name, p in model.named_parameters() if "modules_to_save" in name):
        parameter.add_(0.1)
    model.save_pretrained(tmp_path / "adapter")
    merge(Source(str(folder), tmp_path / "adapter"), tmp_path / "merged", check=False)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.config.tie_word_embeddings == (not settings)
    torch.testing.assert_close(merged(TOKENS).logits, model(TOKENS).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("kind", "name"), all_pairs(list(EXPERTS), ["sara", "sara-spectral", "sorsa-last"]), ids=str)
def test_from_disk_all_is_as_on_the_loaded_model(kind, name, tmp_path):
    """One expert is read at a time, whether they are stored one by one or together."""
    folder = tmp_path / "model"
    tiny_experts(kind).save_pretrained(folder)
    checkpoint, config = open_checkpoint(folder), config_of(name, target_modules=["q_proj"])
    for size in {"threshold": 0.3}, {"budget": 500}:
        planned = [plan(each, replace(config, r=None, threshold=None, components="first")
                        if name == "sorsa-last" else replace(config, r=None, threshold=None), **size)
                   for each in (checkpoint, tiny_experts(kind))]  # fmt: skip
        assert planned[0].sites.places == planned[1].sites.places
        ranks = planned[0].sites.ranks
        experts = {key: [ranks[f"model.layers.0.mlp.experts.{key}.{index}"] for index in range(3)]
                   for key in ("gate_up_proj", "down_proj")}  # fmt: skip
        assert {kind: depths[0] for kind, depths in by_depth(planned[0]).items() if kind != "q_proj"} == experts
    start(checkpoint, config, tmp_path / "started", seed=3)
    base = tiny_experts(kind)
    torch.manual_seed(3)
    model = get_peft_model(base, config_of(name, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "put-on")
    wanted, found = (load_file(tmp_path / each / "adapter_model.safetensors") for each in ("put-on", "started"))
    assert wanted.keys() == found.keys()
    assert all(torch.equal(tensor, found[key]) for key, tensor in wanted.items())
    loaded = PeftModel.from_pretrained(tiny_experts(kind), tmp_path / "started")
    assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)


def test_a_checkpoint_that_lacks_an_expert_is_named(tmp_path):
    tiny_experts("mixtral").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.0.block_sparse_moe.experts.1.w3.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        SvdtuneError, match=r"no tensors that model\.layers\.0\.mlp\.experts\.gate_up_proj is read from"
    ):
        plan(open_checkpoint(tmp_path), config_of("sorsa-threshold"))
    assert plan(open_checkpoint(tmp_path), config_of("sorsa-threshold", target_parameters=BOTH[1:])).threshold == 0.4


def test_what_a_lora_or_a_split_cannot_hold_is_refused(tmp_path):
    made("gpt_oss", "sara").save_pretrained(tmp_path / "adapter")
    with pytest.raises(SvdtuneError, match="LoRA has one rank for all of them; merge it instead"):
        export_lora(tmp_path / "adapter", tmp_path / "lora")
    with pytest.raises(SvdtuneError, match="layout='split' is of layers"):
        SorsaConfig(r=2, target_parameters=BOTH, layout="split", initialized=True)
