"""Fused projections by slice: everything an adapter does on the rows that are q, k and v."""

import copy

import pytest
import torch
import transformers as tf
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
from test_peft_verbs import CONFIGS, MERGEABLE, TOKENS, UNCHANGED_AT_START, layers, logits, move
from torch import nn

from pairwise import shared_out
from svdtune import MoSaraConfig, SaraConfig, SorsaConfig, SvdtuneError, SvdtuneWarning
from svdtune.methods.layers.slices import FusedLinear, whole_pairs
from svdtune.spectra import base_weight

_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 60}
_ENDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
_FALCON = _SIZES | _ENDS | {"bias": True, "alibi": False}


def _phi3():
    return tf.Phi3ForCausalLM(tf.Phi3Config(**_SIZES, **_ENDS, num_key_value_heads=2, intermediate_size=48))


MODELS = {
    "gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=60, **_ENDS)),
    "phi3": _phi3,
    "gpt_neox": lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**_SIZES, **_ENDS, intermediate_size=64)),
    "bloom": lambda: tf.BloomForCausalLM(tf.BloomConfig(n_layer=2, n_head=4, hidden_size=32, vocab_size=60, **_ENDS)),
    "falcon-7b": lambda: tf.FalconForCausalLM(tf.FalconConfig(**_FALCON, multi_query=True)),
    "falcon-40b": lambda: tf.FalconForCausalLM(
        tf.FalconConfig(**_FALCON, new_decoder_architecture=True, num_kv_heads=2)
    ),
    "falcon-rw": lambda: tf.FalconForCausalLM(tf.FalconConfig(**_FALCON, multi_query=False)),
    "mpt": lambda: tf.MptForCausalLM(tf.MptConfig(d_model=32, n_heads=4, n_layers=2, vocab_size=60, max_seq_len=64)),
}
KINDS = ["gpt2", "phi3", "gpt_neox", "falcon-40b"]
SHARES = shared_out(["start and back", "save", "merge"], CONFIGS, KINDS)
FUSED = {"gpt2": "c_attn", "phi3": "qkv_proj", "mpt": "Wqkv"}


def model_of(kind: str, dtype=torch.float32):
    torch.manual_seed(0)
    return MODELS[kind]().to(dtype).eval()


def fused_name(kind: str) -> str:
    return FUSED.get(kind, "query_key_value")


def config_of(kind: str, name: str, **settings):
    cls, own = CONFIGS[name]
    slices = {"fused_slices": {fused_name(kind): ["q", "v"]}, "target_modules": [fused_name(kind)]}
    return cls(**(own | slices | settings), task_type="CAUSAL_LM")


def adapted(kind: str, name: str, moved: float = 0.1, dtype=torch.float32, **settings):
    return move(get_peft_model(model_of(kind, dtype), config_of(kind, name, **settings)).eval(), moved)


class TestEveryMethod:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("name", CONFIGS)
    def test_it_is_the_adapter_of_each_slice_alone(self, kind, name):
        """Outputs and gradients are those of base model whose fused weight has each slice's ΔW in
        its rows."""
        model = adapted(kind, name)
        first = next(module for module in model.modules() if isinstance(module, FusedLinear))
        assert [key for key, _ in first.named_children()] == ["base_layer", "q", "v"]
        width = first.get_base_layer().weight.shape[0 if kind == "gpt2" else 1]
        x = torch.randn(2, 5, width, generator=torch.Generator().manual_seed(5)).requires_grad_()
        twin_x = x.detach().clone().requires_grad_()
        got = first(x)
        want = first.get_base_layer()(twin_x)
        for part in first.slices():
            rows = part.get_base_layer().rows
            # a plain linear layer with the slice's rows, adapted with the same factors
            plain = type(part)(nn.Linear(width, rows.count, bias=False))
            plain.get_base_layer().weight.data = torch.zeros(rows.count, width)
            plain.r, plain.configs, plain._active_adapter = part.r, part.configs, part._active_adapter
            for tensor in (*part.trained, *part.frozen):
                setattr(plain, tensor, getattr(part, tensor))
            setattr(plain, f"{part.method}_dropout", getattr(part, f"{part.method}_dropout"))
            added = torch.zeros_like(want)
            rows.of(added, -1).copy_(rows.apart(plain(twin_x), -1))
            want = want + added
        assert torch.allclose(got, want, atol=1e-5)
        got.square().sum().backward()
        gradients = [p.grad.clone() for p in first.parameters() if p.grad is not None]
        first.zero_grad()
        want.square().sum().backward()
        assert torch.allclose(x.grad, twin_x.grad, atol=1e-4)
        wanted = [p.grad for p in first.parameters() if p.grad is not None]
        assert gradients
        for one, other in zip(gradients, wanted, strict=True):
            assert torch.allclose(one, other, atol=1e-4)

    @pytest.mark.parametrize(("name", "kind"), SHARES["start and back"])
    def test_start_and_back(self, kind, name):
        base = logits(model_of(kind))
        weights = model_of(kind).state_dict()
        model = adapted(kind, name, moved=0)
        if name in UNCHANGED_AT_START:
            assert torch.equal(logits(model), base)
        move(model, 0.1)
        assert not torch.allclose(logits(model), base, atol=1e-4)
        with model.disable_adapter():
            assert torch.equal(logits(model), base)
        got = model.unload().state_dict()
        assert got.keys() == weights.keys()
        for key, value in got.items():
            assert torch.equal(value, weights[key]), key

    @pytest.mark.parametrize(("name", "kind"), SHARES["save"])
    def test_save_and_load(self, kind, name, tmp_path, monkeypatch):
        model = adapted(kind, name)
        model.save_pretrained(tmp_path)
        monkeypatch.setattr("svdtune.spectra.ranks", None)
        monkeypatch.setattr("svdtune.spectra.factors", None)
        for low_cpu_mem_usage in (False, True):
            loaded = PeftModel.from_pretrained(model_of(kind), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
            assert torch.equal(logits(loaded), logits(model))
        config = loaded.peft_config["default"]
        assert all(key.endswith((".q", ".v")) for key in config.ranks)
        assert set(config.slices) == set(config.ranks) == set(config.base_fingerprint)

    @pytest.mark.parametrize(("name", "kind"), SHARES["merge"])
    def test_merging(self, kind, name):
        model = adapted(kind, name)
        before, weights = logits(model), {k: v.clone() for k, v in model.state_dict().items()}
        if name not in MERGEABLE:
            with pytest.raises(SvdtuneError, match="heads, which cannot be merged"):
                model.merge_adapter()
            return
        model.merge_adapter()
        assert torch.allclose(logits(model), before, atol=1e-4)
        with model.disable_adapter():
            logits(model)
        assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
        model.merge_adapter()
        model.unmerge_adapter()
        assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
        merged = model.merge_and_unload(safe_merge=True)
        assert not layers(merged)
        assert not any(isinstance(module, FusedLinear) for module in merged.modules())
        assert torch.allclose(logits(merged), before, atol=1e-4)


@pytest.mark.parametrize("name", ["sara", "mosara-one-head", "sorsa"])
@pytest.mark.parametrize("kind", MODELS)
def test_the_whole_pairs_are_the_change_of_the_weight(kind, name):
    """What export to LoRA is made of: one pair a module, of the ranks' sum, zero outside the
    slices."""
    model = adapted(kind, name)
    config = model.peft_config["default"]
    found = {key: module for key, module in model.base_model.model.named_modules() if key in config.ranks}
    pairs = {key: module.low_rank_pair(module.adapter_tensors("default"), config) for key, module in found.items()}
    whole = whole_pairs(config.slices, pairs)
    merged = model.merge_and_unload()
    for key, weight in model_of(kind).named_modules():
        if key.rpartition(".")[2] == fused_name(kind):
            A, B = whole[key]
            assert A.shape[1] == sum(rank for layer, rank in config.ranks.items() if config.module_of(layer) == key) * (
                2 if name == "sorsa" else 1
            )
            delta = base_weight(merged.get_submodule(key)) - base_weight(weight)
            assert torch.allclose(delta, B @ A.mT, atol=1e-5)


def test_several_adapters_on_one_model(tmp_path):
    base = logits(model_of("gpt2"))
    model = adapted("gpt2", "sorsa")
    first = logits(model)
    model.add_adapter("second", config_of("gpt2", "sorsa", fused_slices={"c_attn": ["k", "v"]}))
    assert torch.equal(logits(model), first)
    model.set_adapter("second")
    second = logits(move(model, 0.2, seed=2))
    assert not torch.allclose(second, first, atol=1e-3)
    model.save_pretrained(tmp_path)
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    status = model.get_model_status()
    assert (status.enabled, status.active_adapters, status.merged_adapters) == (True, ["default"], [])
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
        assert model.get_model_status().enabled is False
    model.set_adapter("second")
    model.delete_adapter("default")
    assert torch.equal(logits(model), second)
    loaded = PeftModel.from_pretrained(model_of("gpt2"), tmp_path / "second").eval()
    assert torch.equal(logits(loaded), second)


def test_copies_are_independent():
    model = adapted("gpt_neox", "sorsa")
    before = logits(model)
    twin = copy.deepcopy(model)
    twin.merge_adapter()
    move(twin, 0.5)
    assert torch.equal(logits(model), before)
    part = next(m for m in twin.modules() if isinstance(m, FusedLinear))
    assert all(layer.get_base_layer().whole is part.base_layer for layer in part.slices())


def test_compact_files(tmp_path):
    """Frozen factors that are left out of the file come back from the slice's own rows."""
    model = adapted("gpt_neox", "sorsa", compact=True)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(model_of("gpt_neox"), tmp_path).eval()
    assert torch.equal(logits(loaded), logits(model))


def test_what_peft_tells_of_the_layers():
    status = {layer.name: layer for layer in adapted("gpt2", "sara").get_layer_status()}
    slices = [layer for name, layer in status.items() if name.endswith((".q", ".v"))]
    assert len(slices) == 4
    assert all(layer.active_adapters == layer.available_adapters == ["default"] for layer in slices)


def test_auto_takes_what_the_paper_adapts():
    for config, slices in (
        (SaraConfig(r=2, fused_slices="auto"), {"q", "v"}),
        (MoSaraConfig(r=2, fused_slices="auto"), {"q", "v"}),
        (SorsaConfig(r=2, fused_slices="auto", target_modules="all-linear"), {"q", "k", "v", "c_proj", "c_fc"}),
    ):
        ranks = get_peft_model(model_of("gpt2"), config).peft_config["default"].ranks
        assert {name.rpartition(".")[2] for name in ranks} == slices
    ranks = get_peft_model(model_of("phi3"), SorsaConfig(r=2, fused_slices="auto")).peft_config["default"].ranks
    assert {name.rpartition(".")[2] for name in ranks} == {"q", "k", "v", "gate", "up", "o_proj", "down_proj"}


def test_ranks_and_patterns_are_a_slices_own():
    settings = {"r": None, "threshold": 0.3, "rank_pattern": {r"h\.0\.attn\.c_attn": 2, r"c_attn\.v": 3}}
    ranks = get_peft_model(model_of("gpt2"), config_of("gpt2", "sara", **settings)).peft_config["default"].ranks
    assert {rank for name, rank in ranks.items() if name.endswith(".v")} == {3}
    assert ranks["transformer.h.0.attn.c_attn.q"] == 2  # of the module that it is a slice of
    assert ranks["transformer.h.1.attn.c_attn.q"] > 3
    with pytest.warns(SvdtuneWarning, match=r"did not match any targeted module.*c_attn.k"):
        get_peft_model(model_of("gpt2"), config_of("gpt2", "sara", rank_pattern={"c_attn.k": 2}))


def test_a_step_trains_the_slices(tmp_path):
    model = adapted("gpt2", "sara", bias="sara_only")
    trained = {key: p.detach().clone() for key, p in model.named_parameters() if p.requires_grad}
    frozen = {key: p.detach().clone() for key, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    optimizer.step()
    assert all(not torch.equal(p, trained[key]) for key, p in model.named_parameters() if key in trained)
    assert all(torch.equal(p, frozen[key]) for key, p in model.named_parameters() if key in frozen)
    assert any(key.endswith("c_attn.base_layer.bias") for key in trained)


def test_the_low_level_api():
    config = config_of("gpt2", "sorsa", fused_slices={"c_attn": ["q", "v"]})
    model = inject_adapter_in_model(config, model_of("gpt2"))
    tensors = get_peft_model_state_dict(model)
    again = inject_adapter_in_model(copy.deepcopy(config), model_of("gpt2"), state_dict=tensors)
    assert get_peft_model_state_dict(again).keys() == tensors.keys()


def test_offloaded_weights():
    """Accelerate keeps the fused weight away between calls; slices compute all the same, and are
    merged on disk."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    before = logits(adapted("gpt2", "sara"))
    model = adapted("gpt2", "sara")
    for module in model.modules():
        if isinstance(module, FusedLinear):
            kept = {key: value.clone() for key, value in module.base_layer.state_dict().items()}
            add_hook_to_module(module.base_layer, AlignDevicesHook("cpu", offload=True, weights_map=kept))
            assert module.base_layer.weight.is_meta
    assert torch.equal(logits(model), before)
    with pytest.raises(SvdtuneError, match=r"offloaded weight cannot be merged in memory.*svdtune merge"):
        model.merge_adapter()


@pytest.mark.parametrize("name", ["sara", "mosara", "sorsa"])
@pytest.mark.slow
def test_a_compiled_projection_computes_the_same(name):
    layer = next(m for m in adapted("gpt_neox", name).modules() if isinstance(m, FusedLinear))
    x = torch.randn(2, 5, 32)
    compiled = torch.compile(layer, backend="eager")
    assert torch.equal(compiled(x), layer(x))
    with torch.no_grad():
        assert torch.equal(compiled(x), layer(x))
    torch.compiler.reset()


class TestClearErrors:
    @pytest.mark.parametrize(
        ("slices", "message"),
        [
            ({"c_attn": ["x"]}, r"c_attn' has no slice 'x'; it has q, k, v"),
            ({"c_attn": {"q": [1, 32, 0, 32]}}, r"slice 'q' of .* but the weight has 96 rows"),
            ({"c_attn": {"q": [1, 96, 32, 32]}}, r"slice 'q' of .*rows 32 to 32"),
            ({"c_attn": "q"}, r"must list slices by name"),
            ({"c_attn": []}, r"must list slices by name"),
            ({"c_attn": {"q": [1, 2]}}, r"\[groups, width, start, stop\]"),
            ("q", r"`fused_slices` must be 'auto' or a dict"),
            ({"c_proj": ["q"]}, r"how its weight is made up is not known"),
        ],
    )
    def test_slices_that_are_none(self, slices, message):
        model = model_of("gpt2")
        with pytest.raises(SvdtuneError, match=message):
            get_peft_model(model, SaraConfig(r=2, target_modules=["c_attn", "c_proj"], fused_slices=slices))
        assert not layers(model)

    def test_slices_that_no_target_has(self):
        with pytest.raises(SvdtuneError, match=r"`fused_slices` names 'qkv', but no target module is called that"):
            get_peft_model(model_of("gpt2"), SaraConfig(r=2, fused_slices={"qkv": ["q"]}))

    def test_one_adapter_by_slice_and_one_of_the_whole(self):
        model = adapted("gpt2", "sara")
        with pytest.raises(SvdtuneError, match=r"an adapter already that adapts it by slices.*same `fused_slices`"):
            model.add_adapter("second", config_of("gpt2", "sara", fused_slices=None))
        model = adapted("gpt2", "sara", fused_slices=None)
        with pytest.raises(SvdtuneError, match="an adapter already that adapts it as a whole"):
            model.add_adapter("second", config_of("gpt2", "sara"))
