"""A merged checkpoint stands alone, gives the adapter's outputs, keeps the base folder's files, and
appears only if so."""

import errno
import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, VeraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from svdtune import MoSaraConfig, SaraConfig, SorsaConfig
from svdtune.errors import SvdtuneError
from svdtune.export import Source, find_source, merge, open_source
from svdtune.export.layerwise import LayerwiseAdapter
from svdtune.models import load
from tiny import moved, tiny_gpt2

IDS = torch.tensor([[5, 60, 7, 200, 11]])


def save_adapter(base: Path, folder: Path, config=None) -> Path:
    """An adapter whose every parameter differs from its start, as after training."""
    if config is None:
        config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    moved(get_peft_model(load(base).model, config), 0.05).save_pretrained(folder)
    return folder


def saved(model, folder: Path, tokenizer, **settings) -> Path:
    model.save_pretrained(folder, **settings)
    tokenizer.save_pretrained(folder)
    return folder


@torch.no_grad()
def logits(model):
    return model.eval()(IDS).logits.float()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_keeps_dtype_tokenizer_and_generation_config(tiny_folder: Path, tmp_path: Path, dtype: str) -> None:
    base = tmp_path / "base"
    loaded = load(tiny_folder, dtype=dtype)
    loaded.model.generation_config.update(max_new_tokens=7)
    loaded.model.save_pretrained(base)
    loaded.tokenizer.chat_template = "{{ messages[0]['content'] }}"
    loaded.tokenizer.save_pretrained(base)
    adapter = save_adapter(base, tmp_path / "adapter")
    report = merge(find_source(adapter), tmp_path / "merged")

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert model.dtype == getattr(torch, dtype)
    assert report.dtype == dtype
    assert report.layers == 14
    assert not isinstance(model, PeftModel)
    assert not any("lora" in name for name in model.state_dict())
    assert model.generation_config.max_new_tokens == 7
    assert tokenizer.chat_template == loaded.tokenizer.chat_template
    assert tokenizer.encode("2 + 2<|end|>") == loaded.tokenizer.encode("2 + 2<|end|>")

    ids = torch.tensor([tokenizer.encode("The answer is 4.")])
    with torch.no_grad():
        expected = open_source(find_source(adapter)).model(ids).logits.float()
        found = model(ids).logits.float()
    limit = {"float32": 1e-5, "float16": 1e-2, "bfloat16": 5e-2}[dtype]
    assert (found - expected).norm() <= limit * expected.norm()
    assert report.comparison.relative <= limit < report.comparison.effect


def test_shards_their_names_and_every_other_file_stay(tiny_folder: Path, tmp_path: Path, tiny_tokenizer) -> None:
    base = saved(load(tiny_folder).model, tmp_path / "base", tiny_tokenizer, max_shard_size="10KB")
    (base / "LICENSE").write_text("a licence")
    (base / "consolidated.pth").write_text("weights in another format")
    (base / ".gitattributes").write_text("")
    adapter = save_adapter(base, tmp_path / "adapter", SorsaConfig(r=4, target_modules=["q_proj"]))
    merge(find_source(adapter), tmp_path / "merged")
    names = {path.name for path in base.iterdir()} - {"README.md", "consolidated.pth", ".gitattributes"}
    assert {path.name for path in (tmp_path / "merged").iterdir()} == names | {"README.md"}
    assert "| adapter | SORSA |" in (tmp_path / "merged" / "README.md").read_text()
    shards = sorted(name for name in names if name.endswith(".safetensors"))
    assert len(shards) > 3
    for file in ("model.safetensors.index.json", "config.json", "LICENSE", "tokenizer.json", "generation_config.json"):
        before, after = ((folder / file).read_text() for folder in (base, tmp_path / "merged"))
        assert (json.loads(before) == json.loads(after)) if file.endswith(".json") else before == after
    for shard in shards:
        before, after = load_file(base / shard), load_file(tmp_path / "merged" / shard)
        assert list(before) == list(after)
        for name, tensor in before.items():
            assert torch.equal(tensor, after[name]) == ("q_proj" not in name), name


def test_an_index_cannot_lead_out_of_the_folder(tiny_folder: Path, tmp_path: Path, tiny_tokenizer) -> None:
    base = saved(load(tiny_folder).model, tmp_path / "a" / "base", tiny_tokenizer, max_shard_size="10KB")
    adapter = save_adapter(base, tmp_path / "adapter", SorsaConfig(r=4, target_modules=["q_proj"]))
    index = base / "model.safetensors.index.json"
    found = json.loads(index.read_text())
    shard = next(iter(found["weight_map"].values()))
    (base / shard).rename(tmp_path / "a" / "owned")
    index.write_text(index.read_text().replace(shard, "../owned"))
    (tmp_path / "b").mkdir()
    with pytest.raises(SvdtuneError, match=r"names '\.\./owned', which is no file of its folder"):
        merge(find_source(adapter), tmp_path / "b" / "merged", check=False)
    assert list((tmp_path / "b").iterdir()) == []


def test_the_dtype_asked_for(tiny_folder: Path, tmp_path: Path) -> None:
    adapter = save_adapter(tiny_folder, tmp_path / "adapter", SaraConfig(r=3))
    report = merge(find_source(adapter), tmp_path / "merged", dtype="bfloat16")
    assert report.dtype == "bfloat16"
    assert {tensor.dtype for tensor in load_file(tmp_path / "merged/model.safetensors").values()} == {torch.bfloat16}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto").dtype == torch.bfloat16
    with pytest.raises(SvdtuneError, match="dtype 'int8' is none to merge in: expected auto, float64, float32"):
        merge(find_source(adapter), tmp_path / "other", dtype="int8")


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`", "ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize(
    "config",
    [
        SorsaConfig(r=4),
        SaraConfig(threshold=0.3, modules_to_save=["ln_f"], bias="sara_only"),
        MoSaraConfig(r=6, num_heads=1),
        MoSaraConfig(r=6, num_heads=3, gate="none"),
        LoraConfig(r=4, target_modules=["c_attn", "wte"], fan_in_fan_out=True, init_lora_weights=False),
        LoraConfig(r=4, target_modules=["c_fc"], use_dora=True, use_rslora=True, fan_in_fan_out=True, bias="all"),
        SorsaConfig(r=4, target_modules=["lm_head", "c_proj"]),
        SaraConfig(r=4, modules_to_save=["lm_head"]),
    ],
    ids=["sorsa", "sara-module-bias", "mosara", "no-gate", "lora-embedding", "dora", "head", "saved-head"],
)
def test_conv1d_and_tied_embeddings(config, tmp_path: Path, tiny_tokenizer) -> None:
    """Square Conv1D weights lie transposed; an adapted end of tied embeddings parts from the
    other."""
    base = saved(tiny_gpt2(vocab_size=258, n_positions=256), tmp_path / "base", tiny_tokenizer)
    config.task_type = "CAUSAL_LM"
    adapter = save_adapter(base, tmp_path / "adapter", config)
    report = merge(find_source(adapter), tmp_path / "merged", check=True)
    assert report.comparison.relative < 1e-4 * report.comparison.effect + 2e-6
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert torch.allclose(logits(merged), logits(open_source(find_source(adapter)).model), atol=1e-4)
    both = {"wte", "lm_head"} & {*(config.target_modules or ()), *(config.modules_to_save or ())}
    assert merged.config.tie_word_embeddings == (not both)


def test_weights_that_transformers_renames_keep_their_stored_names(tmp_path: Path, tiny_tokenizer) -> None:
    """Mixtral's attention and router lie under older names, and its experts one by one."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = MixtralForCausalLM(MixtralConfig(**sizes, vocab_size=258, num_local_experts=2, num_key_value_heads=2))
    base = saved(model, tmp_path / "base", tiny_tokenizer)
    adapter = save_adapter(
        base, tmp_path / "adapter", SorsaConfig(r=4, target_modules=["q_proj"], modules_to_save=["gate"])
    )
    report = merge(find_source(adapter), tmp_path / "merged", check=True)
    assert report.comparison.relative < 1e-5 < report.comparison.effect
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "merged"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys()
    assert changed == {name for name in before if name.endswith(("q_proj.weight", ".gate.weight"))}


def test_older_names_of_norms_are_kept(tmp_path: Path, tiny_tokenizer) -> None:
    pytest.importorskip("transformers.core_model_loading")  # the table of older names
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    base = saved(BertForSequenceClassification(BertConfig(**sizes, vocab_size=258)), tmp_path / "base", tiny_tokenizer)
    renamed = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    tensors = load_file(base / "model.safetensors")
    for new, old in renamed.items():
        tensors = {name.replace(new, old): tensor for name, tensor in tensors.items()}
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    model = get_peft_model(
        BertForSequenceClassification.from_pretrained(base), SaraConfig(r=2, target_modules=["query"], bias="all")
    )
    moved(model)
    model.save_pretrained(tmp_path / "adapter")
    merge(Source(str(base), tmp_path / "adapter"), tmp_path / "merged")
    assert load_file(tmp_path / "merged/model.safetensors").keys() == tensors.keys()
    merged = BertForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert torch.allclose(logits(merged), logits(model), atol=1e-5)
    assert not torch.allclose(logits(merged), logits(BertForSequenceClassification.from_pretrained(base)), atol=1e-3)


def test_a_weight_that_the_base_does_not_store_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    adapter = save_adapter(tiny_folder, tmp_path / "adapter")
    base = tmp_path / "base"
    shutil.copytree(tiny_folder, base)
    tensors = load_file(base / "model.safetensors")
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SvdtuneError, match=r"stores no 'model\.layers\.1\.mlp\.up_proj\.weight' under that name"):
        merge(Source(str(base), adapter), tmp_path / "out" / "merged")
    assert list((tmp_path / "out").iterdir()) == []


def test_features_come_from_the_model_without_a_head(tiny_folder: Path, tmp_path: Path) -> None:
    config = SaraConfig(r=2, target_modules=["q_proj"], task_type="FEATURE_EXTRACTION")
    get_peft_model(AutoModel.from_pretrained(tiny_folder), config).save_pretrained(tmp_path / "adapter")
    report = merge(Source(str(tiny_folder), tmp_path / "adapter"), tmp_path / "merged")
    assert report.layers == 2
    before, after = (load_file(folder / "model.safetensors") for folder in (tiny_folder, tmp_path / "merged"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"model.layers.{i}.self_attn.q_proj.weight" for i in range(2)}


def test_an_adapter_for_another_base_is_refused(tiny_folder: Path, tmp_path: Path, monkeypatch) -> None:
    adapter = save_adapter(tiny_folder, tmp_path / "adapter", SorsaConfig(r=4))
    other = tmp_path / "other"
    shutil.copytree(tiny_folder, other)
    weights = load_file(other / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0] += 1
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        SvdtuneError, match=r"another base model: the weight of 'model\.layers\.1\.mlp\.up_proj' differs"
    ):
        merge(Source(str(other), adapter), tmp_path / "out" / "merged")
    assert list((tmp_path / "out").iterdir()) == []
    config = json.loads((other / "config.json").read_text())
    LlamaForCausalLM(LlamaConfig(**config | {"num_hidden_layers": 1})).save_pretrained(tmp_path / "small")
    with pytest.raises(SvdtuneError, match=r"this one has no module for '\S+layers\.1\S+'"):
        merge(Source(str(tmp_path / "small"), adapter), tmp_path / "out" / "merged")
    lora = save_adapter(tiny_folder, tmp_path / "lora")
    with pytest.raises(SvdtuneError, match=r"this one has no module for '\S+layers\.1\S+'"):
        merge(Source(str(tmp_path / "small"), lora), tmp_path / "out" / "merged")
    monkeypatch.setenv("SVDTUNE_BASE_CHECK", "off")
    assert merge(Source(str(other), adapter), tmp_path / "merged", check=True).comparison.relative < 1e-5


NO_LAYERS = {
    "shared matrices": VeraConfig(r=2, target_modules=["q_proj"]),
    "single tokens": LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[1]),
}


@pytest.mark.parametrize("config", NO_LAYERS.values(), ids=NO_LAYERS)
def test_what_lies_in_no_single_layer_is_refused(config, tiny_folder: Path, tmp_path: Path) -> None:
    get_peft_model(load(tiny_folder).model, config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(SvdtuneError, match=r"or trains what lies in no single layer: .* merge in memory"):
        merge(Source(str(tiny_folder), tmp_path / "adapter"), tmp_path / "merged")


def test_damaged_files_are_refused(tiny_folder: Path, tmp_path: Path) -> None:
    adapter = save_adapter(tiny_folder, tmp_path / "adapter", SorsaConfig(r=4))
    base = tmp_path / "base"
    shutil.copytree(tiny_folder, base)
    whole = (base / "model.safetensors").read_bytes()
    (base / "model.safetensors").write_bytes(whole[:-50])
    with pytest.raises(SvdtuneError, match=r"model\.safetensors is missing, cut short or damaged"):
        merge(Source(str(base), adapter), tmp_path / "merged")
    (base / "model.safetensors").write_bytes(whole)
    weights = load_file(adapter / "adapter_model.safetensors")
    weights.pop("base_model.model.model.layers.0.mlp.up_proj.sorsa_U")
    save_file(weights, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SvdtuneError, match="is not the file that was saved with this adapter"):
        merge(Source(str(base), adapter), tmp_path / "merged")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"weights_sha256": None}))
    with pytest.raises(SvdtuneError, match=r"lacks sorsa_U of layer 'model\.layers\.0\.mlp\.up_proj'"):
        merge(Source(str(base), adapter), tmp_path / "merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_a_full_disk_leaves_nothing(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = save_adapter(tiny_folder, tmp_path / "adapter", SaraConfig(r=3))

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("svdtune.checkpoint.writer._copy", full)
    with pytest.raises(SvdtuneError, match=r"cannot write .*merged: the disk is full"):
        merge(find_source(adapter), tmp_path / "out" / "merged")
    assert list((tmp_path / "out").iterdir()) == []


def test_logits_are_compared_where_the_model_fits(tiny_folder: Path, tmp_path: Path, monkeypatch) -> None:
    adapter = save_adapter(tiny_folder, tmp_path / "adapter", SaraConfig(r=3))
    report = merge(find_source(adapter), tmp_path / "unasked", check=False)
    assert (report.comparison, report.unchecked) == (None, "not asked for")

    class Memory:
        available = 1000

    monkeypatch.setattr("svdtune.export.comparison.psutil.virtual_memory", Memory)
    report = merge(find_source(adapter), tmp_path / "large")
    assert report.comparison is None
    assert "GiB of memory, of which 0.0 are free" in report.unchecked
    with pytest.raises(SvdtuneError, match="cannot be compared with the adapter: that takes about"):
        merge(find_source(adapter), tmp_path / "asked", check=True)
    assert not (tmp_path / "asked").exists()


def test_a_base_without_a_tokenizer_merges_unchecked(tiny_folder: Path, tmp_path: Path) -> None:
    adapter = save_adapter(tiny_folder, tmp_path / "adapter", SaraConfig(r=3))
    load(tiny_folder).model.save_pretrained(tmp_path / "bare")
    report = merge(Source(str(tmp_path / "bare"), adapter), tmp_path / "merged")
    assert "the tokenizer of" in report.unchecked
    assert (tmp_path / "merged/model.safetensors").is_file()


def test_weights_that_are_no_safetensors_are_converted_first(tiny_folder: Path, tmp_path: Path, tiny_tokenizer) -> None:
    adapter = save_adapter(tiny_folder, tmp_path / "adapter", SaraConfig(r=3))
    base = tmp_path / "base"
    shutil.copytree(tiny_folder, base)
    torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    (tmp_path / "out").mkdir()
    report = merge(Source(str(base), adapter), tmp_path / "out" / "merged", check=True)
    assert report.comparison.relative < 1e-5
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["merged"]


def test_a_checkpoint_with_other_outputs_is_not_kept(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A merge that forgets the adapter gives the base model: it must not pass."""
    adapter = save_adapter(tiny_folder, tmp_path / "adapter")
    monkeypatch.setattr(LayerwiseAdapter, "merged", lambda self, layer, weight: weight)
    with pytest.raises(SvdtuneError, match="does not give the adapter's outputs"):
        merge(find_source(adapter), tmp_path / "out" / "merged")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("config", [LoraConfig(r=1, init_lora_weights=False), SorsaConfig(r=1)])
def test_weights_that_overflow_are_not_kept(tiny_folder: Path, tmp_path: Path, config, monkeypatch) -> None:
    config.target_modules = {"q_proj"}
    model = get_peft_model(load(tiny_folder).model, config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.fill_(1e5)
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(SvdtuneError, match=r"does not fit torch\.float16: it holds NaN or infinity; .*--dtype float32"):
        merge(find_source(tmp_path / "adapter"), tmp_path / "out" / "merged", dtype="float16")
    with torch.no_grad():
        next(parameter for parameter in model.parameters() if parameter.requires_grad).fill_(float("inf"))
    monkeypatch.setenv("SVDTUNE_FINITE_CHECK", "off")
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(SvdtuneError, match="NaNs detected"):
        merge(find_source(tmp_path / "adapter"), tmp_path / "out" / "merged")
    assert list((tmp_path / "out").iterdir()) == []


def test_refusals(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(SvdtuneError, match="nothing to merge"):
        merge(Source(str(tiny_folder)), tmp_path / "merged")
    adapter = save_adapter(tiny_folder, tmp_path / "adapter")
    with pytest.raises(SvdtuneError, match="not empty"):
        merge(find_source(adapter), adapter)
    several = save_adapter(tiny_folder, tmp_path / "several", MoSaraConfig(r=4, num_heads=2))
    with pytest.raises(SvdtuneError, match="2 heads, which cannot be merged"):
        merge(find_source(several), tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
