"""Plans of tiny models in every format, against the models that PEFT builds from them."""

import json
import re

import pytest
import torch
from peft import LoraConfig, VeraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForSequenceClassification,
    ResNetConfig,
    ResNetForImageClassification,
)

from svdtune.checkpoint import open_checkpoint
from svdtune.errors import SvdtuneError
from svdtune.linalg import rank_at_threshold, spectrum
from svdtune.methods import MoSaraConfig, SaraConfig, SorsaConfig
from svdtune.planning import Setting, anatomy, by_depth, draw_chart, estimate, plan
from tiny import LLAMA, tiny_gpt2, tiny_llama

QV = ["q_proj", "v_proj"]
CONFIGS = {"sara": SaraConfig, "mosara": MoSaraConfig, "sorsa": SorsaConfig, "lora": LoraConfig}
# Options of the plan itself; the others are the configuration's.
SIZES = ("threshold", "budget", "match_lora")


def planned(checkpoint, method="sara", **options):
    """The plan of a method's configuration, from options of both in one."""
    sizes = {name: options.pop(name) for name in SIZES if name in options}
    return plan(checkpoint, CONFIGS[method](**options), **sizes)


def llama(**changes):
    settings = {"num_hidden_layers": 3, "num_key_value_heads": 2, "vocab_size": 64, "tie_word_embeddings": True}
    return tiny_llama(**settings | changes).train()


@pytest.fixture
def folder(tmp_path):
    llama().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def svd_ranks(model, threshold, suffixes):
    return {
        name: rank_at_threshold(torch.linalg.svdvals(module.weight.double()), threshold)
        for name, module in model.named_modules()
        if name.endswith(tuple(suffixes))
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ranks_are_those_of_the_loaded_model(folder, dtype):
    model = llama().to(dtype)
    model.save_pretrained(folder)
    made = planned(open_checkpoint(folder), "sara", threshold=0.2, target_modules=QV)
    assert made.sites.ranks == svd_ranks(model, 0.2, QV)
    assert made.base_parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("method", "config"), [("sara", SaraConfig), ("mosara", MoSaraConfig), ("sorsa", SorsaConfig), ("lora", LoraConfig)]
)
@pytest.mark.parametrize("targets", [QV, "all-linear", r".*\.[02]\..*(q|o)_proj"])
def test_a_plan_trains_exactly_what_it_says(folder, method, config, targets):
    made = planned(open_checkpoint(folder), method, threshold=0.3, target_modules=targets)
    section = made.method_section()
    assert section.pop("name") == method
    section = section if method != "lora" else made.lora_section()
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config(**section))
    trained, everything = adapted.get_nb_trainable_parameters()
    assert trained == made.trained
    assert everything == made.base_parameters + made.trained + made.frozen
    assert made.share == pytest.approx(trained / everything)


def test_a_stock_lora_takes_the_ranks(folder):
    made = planned(open_checkpoint(folder), "sara", threshold=0.3, target_modules="all-linear")
    section = json.loads(json.dumps(made.to_json()))["lora"]
    adapted = get_peft_model(llama(), LoraConfig(**section))
    found = {
        name.removeprefix("base_model.model."): module.r["default"]
        for name, module in adapted.named_modules()
        if hasattr(module, "lora_A") and hasattr(module, "base_layer")
    }
    assert found == made.sites.ranks
    assert {s for m in adapted.modules() if hasattr(m, "lora_A") for s in m.scaling.values()} == {1.0}


def test_patterns_hit_exactly_one_module(folder):
    from peft.utils.other import get_pattern_key

    made = planned(open_checkpoint(folder), "sara", threshold=0.3, target_modules=QV)
    pattern = made.config.rank_pattern
    for site in made.sites:
        assert pattern[get_pattern_key(pattern, site.name)] == site.rank
        for other in (f"vision.{site.name}", f"x{site.name}", site.name.replace(".", "x")):
            assert get_pattern_key(pattern, other) == other


@pytest.mark.parametrize("method", ["sara", "mosara", "sorsa", "lora"])
@pytest.mark.parametrize("budget", ["6%", "1500", "2k"])
def test_a_budget_is_met_as_closely_as_ranks_allow(folder, method, budget):
    checkpoint = open_checkpoint(folder)
    made = planned(checkpoint, method, budget=budget, target_modules=QV)
    limit = {"1500": 1500, "2k": 2000}.get(budget)

    def fits(candidate):
        return candidate.share <= 0.06 if limit is None else candidate.trained <= limit

    assert fits(made)
    same = planned(checkpoint, method, threshold=made.threshold, target_modules=QV)
    assert same.sites.ranks == made.sites.ranks
    # The next step of any layer's spectrum breaks the budget.
    spectra = [spectrum(checkpoint.weight(site.name)) for site in made.sites]
    step = min(float(s.values[: site.rank].sum()) / s.total for s, site in zip(spectra, made.sites, strict=True))
    if made.threshold < 1:
        more = planned(checkpoint, method, threshold=min(1.0, step + 1e-9), target_modules=QV)
        assert not fits(more)


def test_the_threshold_that_matches_a_lora(folder):
    checkpoint = open_checkpoint(folder)
    lora = planned(checkpoint, "lora", r=4, target_modules=QV)
    made = planned(checkpoint, "sara", match_lora=4, target_modules=QV)
    assert 0.8 * lora.trained < made.trained <= lora.trained


def test_a_budget_below_rank_one_says_what_is_needed(folder):
    with pytest.raises(SvdtuneError, match=r"at least [\d,]+ parameters .* more than the budget of 10"):
        planned(open_checkpoint(folder), "sara", budget="10", target_modules=QV)


@pytest.mark.parametrize("budget", ["0", "0%", "100%", "-5", "lots", "", "1e99", "nan", "1.5.2k"])
def test_budgets_that_make_no_sense_are_refused(folder, budget):
    with pytest.raises(SvdtuneError, match="neither a share"):
        planned(open_checkpoint(folder), "sara", budget=budget, target_modules=QV)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"threshold": 0.1, "budget": "5%"},
            "at most one of threshold, budget and match_lora; got threshold and budget",
        ),
        ({"threshold": 0.0}, "threshold must lie"),
        ({"r": 33}, r"r = 33 is larger than layer .* its rank is at most (16|32)"),
        ({"r": 0}, "must be a whole number of at least 1"),
        ({"match_lora": 0}, "match_lora"),
        ({"threshold": 0.1, "target_modules": ["nothing"]}, "no module matches target_modules"),
        ({"threshold": 0.1, "target_modules": ["embed_tokens"]}, "Embedding"),
    ],
)
def test_arguments_that_cannot_be_are_refused(folder, arguments, message):
    with pytest.raises(SvdtuneError, match=message):
        planned(open_checkpoint(folder), "sara", **{"target_modules": QV} | arguments)


def test_methods_without_ranks_by_layer_have_no_threshold_and_no_budget(folder):
    checkpoint, config = open_checkpoint(folder), VeraConfig(r=3, target_modules=["q_proj"])
    made = plan(checkpoint, config)
    assert made.sites.ranks == {f"model.layers.{depth}.self_attn.q_proj": 3 for depth in range(3)}
    assert made.trained == get_peft_model(llama(), config).get_nb_trainable_parameters()[0]
    assert made.method_section() == {"name": "vera", "r": 3, "target_modules": ["q_proj"]}
    for sizes in ({"threshold": 0.1}, {"budget": "5%"}, {"match_lora": 2}):
        with pytest.raises(SvdtuneError, match="vera takes no ranks by layer; those that do are lora, dylora, sara"):
            plan(checkpoint, config, **sizes)


def test_ranks_that_the_configuration_gives_stay(folder):
    checkpoint = open_checkpoint(folder)
    for sizes in ({"threshold": 0.2}, {"budget": "2000"}):
        made = planned(checkpoint, "sara", target_modules=QV, rank_pattern={"v_proj": 3}, **sizes)
        ranks = made.sites.ranks
        assert {rank for name, rank in ranks.items() if name.endswith("v_proj")} == {3}
        adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), made.config)
        assert adapted.peft_config["default"].ranks == ranks
        assert adapted.get_nb_trainable_parameters()[0] == made.trained


def test_a_layer_of_one_row_is_planned(folder):
    """A reward model's head [1, n] has no second rank to measure."""
    model = LlamaForSequenceClassification(LlamaConfig(**LLAMA, num_labels=1, pad_token_id=0))
    model.save_pretrained(folder)
    made = planned(open_checkpoint(folder), "sara", budget="600", target_modules=["q_proj", "score"])
    assert made.sites.ranks["score"] == 1
    adapted = get_peft_model(LlamaForSequenceClassification.from_pretrained(folder), made.config)
    assert adapted.get_nb_trainable_parameters()[0] == made.trained <= 600


@pytest.mark.parametrize(("method", "adapted"), [("sara", ["c_attn"]), ("sorsa", ["c_attn", "c_fc", "c_proj"])])
def test_conv1d_and_default_targets(tmp_path, method, adapted):
    """SORSA adapts every linear layer where no targets are named, SARA those that LoRA does."""
    model = GPT2LMHeadModel(GPT2Config(n_embd=24, n_layer=2, n_head=2, vocab_size=50, n_positions=16))
    model.save_pretrained(tmp_path)
    made = planned(open_checkpoint(tmp_path), method, threshold=0.4)
    expected = {
        name: rank_at_threshold(torch.linalg.svdvals(module.weight.double()), 0.4)
        for name, module in model.named_modules()
        if name.endswith(tuple(adapted))
    }
    assert made.sites.ranks == expected
    assert {site.shape for site in made.sites if site.name.endswith("c_attn")} == {(72, 24)}
    own = get_peft_model(model, CONFIGS[method](threshold=0.4))
    assert own.peft_config["default"].ranks == expected
    section = made.method_section()
    assert section.pop("name") == method
    again = get_peft_model(GPT2LMHeadModel.from_pretrained(tmp_path), CONFIGS[method](**section))
    assert again.peft_config["default"].ranks == expected


def test_other_architectures_use_the_class_they_were_saved_from(tmp_path):
    model = BertForSequenceClassification(
        BertConfig(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=30, vocab_size=40)
    )
    model.save_pretrained(tmp_path)
    made = planned(open_checkpoint(tmp_path), "sara", threshold=0.3, target_modules=["query", "value"])
    expected = svd_ranks(model, 0.3, ["query", "value"])
    assert made.sites.ranks == expected


def test_shards_are_found_through_their_index(tmp_path):
    model = llama()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    made = planned(open_checkpoint(tmp_path), "sara", threshold=0.2, target_modules=QV)
    assert made.sites.ranks == svd_ranks(model, 0.2, QV)
    next(tmp_path.glob("*.safetensors")).unlink()
    with pytest.raises(SvdtuneError, match="lacks model-0"):
        open_checkpoint(tmp_path)


def test_one_weight_is_read_at_a_time_and_only_those_needed(folder):
    checkpoint = open_checkpoint(folder)
    read = []
    for name, reader in list(checkpoint.readers.items()):
        checkpoint.readers[name] = lambda name=name, reader=reader: read.append(name) or reader()
    made = planned(checkpoint, "sara", threshold=0.2, target_modules=QV)
    assert read == [f"{site.name}.weight" for site in made.sites]
    read.clear()
    planned(checkpoint, "sorsa", r=2, target_modules=QV)
    assert read == []
    assert all(parameter.is_meta for parameter in checkpoint.model.parameters())


def test_damaged_and_foreign_checkpoints_are_refused(folder, tmp_path):
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SvdtuneError, match="cannot be read"):
        open_checkpoint(folder)
    file.write_bytes(whole)

    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}  # the file is written over
    name = "model.layers.0.self_attn.q_proj.weight"
    save_file({k: v for k, v in tensors.items() if k != name}, file)
    with pytest.raises(SvdtuneError, match=r"no tensor for model\.layers\.0\.self_attn\.q_proj"):
        planned(open_checkpoint(folder), threshold=0.1, target_modules=QV)
    save_file(tensors | {name: torch.ones(3, 3)}, file)
    with pytest.raises(SvdtuneError, match="do not belong together"):
        planned(open_checkpoint(folder), threshold=0.1, target_modules=QV)
    save_file(tensors | {name: torch.full((32, 32), float("nan"))}, file)
    with pytest.raises(SvdtuneError, match=rf"{re.escape(name.removesuffix('.weight'))}: .*NaN"):
        planned(open_checkpoint(folder), threshold=0.1, target_modules=QV)
    file.unlink()
    with pytest.raises(SvdtuneError, match=r"no model\.safetensors"):
        open_checkpoint(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(SvdtuneError, match=r"no config\.json"):
        open_checkpoint(tmp_path / "empty")


def test_a_hub_that_cannot_be_reached_gives_one_clear_error(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(SvdtuneError, match=r"neither a model folder, nor a \.gguf file, nor a hub model"):
        open_checkpoint("nobody/nothing")


def test_a_configuration_is_enough_where_no_weight_is_read(folder, tmp_path):
    whole = planned(open_checkpoint(folder), "sorsa", r=2, target_modules=QV)
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(SvdtuneError, match=r"no model\.safetensors"):
        open_checkpoint(bare)
    checkpoint = open_checkpoint(bare, weights=False)
    assert planned(checkpoint, "sorsa", r=2, target_modules=QV).sites.places == whole.sites.places
    with pytest.raises(SvdtuneError, match="shape without weights"):
        planned(checkpoint, threshold=0.1, target_modules=QV)
    settings = json.loads((bare / "config.json").read_text())
    (bare / "config.json").write_text(json.dumps(settings | {"num_hidden_layers": 10**6}))
    with pytest.raises(SvdtuneError, match="1,000,000 layers"):
        open_checkpoint(bare, weights=False)


def test_of_a_hub_model_no_weights_are_downloaded_where_none_are_read(folder, monkeypatch):
    import huggingface_hub

    asked = []

    def snapshot(name, *, revision, allow_patterns):
        asked.append(allow_patterns)
        return folder

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert open_checkpoint("somebody/something", weights=False).readers == {}
    assert open_checkpoint("somebody/something").readers
    assert asked == [["config.json"], ["config.json", "*.safetensors", "*.safetensors.index.json"]]


def test_memory_grows_with_what_it_depends_on(folder):
    checkpoint = open_checkpoint(folder)
    made = planned(checkpoint, "sorsa", r=4, target_modules=QV)
    sizes = anatomy(made, checkpoint.model)
    one, two = (estimate(sizes, Setting(batch_size=batch, length=64)) for batch in (1, 2))
    assert two.activations == 2 * one.activations
    assert two.logits == 2 * one.logits
    assert (one.weights, one.gradients, one.optimizer) == (2 * made.base_parameters, 4 * made.trained, 8 * made.trained)
    assert (one.adapter, one.frozen) == (6 * made.trained, 4 * made.frozen)
    assert estimate(sizes, Setting(length=64, gradient_checkpointing=True)).activations < one.activations
    assert one.total == sum(one.parts.values())


def test_the_chart_has_a_line_a_kind(folder, tmp_path):
    made = planned(open_checkpoint(folder), "sara", threshold=0.2, target_modules=QV)
    assert {kind: list(ranks) for kind, ranks in by_depth(made).items()} == {kind: [0, 1, 2] for kind in QV}
    for suffix in ("svg", "png"):
        draw_chart(made, tmp_path / "charts" / f"ranks.{suffix}")
    assert (tmp_path / "charts" / "ranks.png").read_bytes()[1:4] == b"PNG"
    with pytest.raises(SvdtuneError, match=r"\.svg"):
        draw_chart(made, tmp_path / "ranks.bmp")


def saved(model, folder):
    model.save_pretrained(folder)
    return open_checkpoint(folder)


@pytest.mark.parametrize(("method", "config"), [("sara", SaraConfig), ("mosara", MoSaraConfig), ("sorsa", SorsaConfig)])
@pytest.mark.parametrize("slices", ["auto", {"c_attn": ["q", "v"]}])
def test_slices_of_fused_projections(method, config, slices, tmp_path):
    checkpoint = saved(tiny_gpt2(), tmp_path)
    made = planned(checkpoint, method, threshold=0.3, target_modules=["c_attn", "c_proj"], fused_slices=slices)
    section = json.loads(json.dumps(made.method_section()))
    assert section.pop("name") == method
    adapted = get_peft_model(GPT2LMHeadModel.from_pretrained(tmp_path), config(**section))
    ranks = adapted.peft_config["default"].ranks
    assert ranks == made.sites.ranks
    assert any(name.endswith("c_attn.q") for name in ranks)
    trained, total = adapted.get_nb_trainable_parameters()
    assert (trained, trained / total) == (made.trained, made.share)
    threshold = {"threshold": 0.3, "target_modules": ["c_attn", "c_proj"], "fused_slices": slices}
    own = get_peft_model(GPT2LMHeadModel.from_pretrained(tmp_path), config(**threshold))
    assert own.peft_config["default"].ranks == ranks
    lora = get_peft_model(
        GPT2LMHeadModel.from_pretrained(tmp_path), LoraConfig(**made.lora_section(), fan_in_fan_out=True)
    )
    got = lora.base_model.model.transformer.h[1].attn.c_attn.r["default"]
    assert got == sum(rank for name, rank in ranks.items() if ".1.attn.c_attn." in name)


def test_convolutions(tmp_path):
    torch.manual_seed(0)
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    checkpoint = saved(ResNetForImageClassification(ResNetConfig(**sizes)), tmp_path)
    made = planned(checkpoint, "sorsa", threshold=0.5, target_modules=["convolution"])
    config = SorsaConfig(threshold=0.5, target_modules=["convolution"])
    adapted = get_peft_model(ResNetForImageClassification.from_pretrained(tmp_path), config)
    assert adapted.peft_config["default"].ranks == made.sites.ranks
    assert adapted.get_nb_trainable_parameters()[0] == made.trained
