"""An adapter as llama.cpp's file: read back by the package gguf, mapped back by Transformers."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

from releases import TRANSFORMERS_4
from svdtune import MoSaraConfig, SaraConfig, SorsaConfig, SvdtuneError, cli, export_lora
from tiny import moved

gguf = pytest.importorskip("gguf")
modeling_gguf = pytest.importorskip("transformers.modeling_gguf_pytorch_utils")

from svdtune.export.gguf import ARCHITECTURES, NEIGHBOURS, known_architectures, write_gguf  # noqa: E402  after what it needs

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 40,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
    "tie_word_embeddings": False,
}
METHODS = {
    "sara": SaraConfig(threshold=0.3, target_modules="all-linear"),
    "mosara": MoSaraConfig(r=5, num_heads=1),
    "sorsa": SorsaConfig(r=3),
    "lora": LoraConfig(r=4, lora_alpha=16, target_modules="all-linear"),
}


def save_base(folder: Path, kind: str = "llama", **changes: Any) -> Path:
    config = AutoConfig.for_model(kind, **SIZES | changes)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def save_adapter(folder: Path, base: Path, config: Any) -> Path:
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    moved(model)
    # as PEFT does by itself, with a warning
    model.save_pretrained(folder, save_embedding_layers="lm_head" in (config.target_modules or ()))
    return folder


def changes_in(lora: Path) -> dict[str, Tensor]:
    """B A by parameter of the model, of a LoRA with alpha = rank."""
    stored = load_file(lora / "adapter_model.safetensors")
    names = {name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"): name for name in stored}
    return {
        f"{layer}.weight": stored[name.replace("lora_A", "lora_B")] @ stored[name]
        for layer, name in names.items()
        if "lora_A" in name
    }


def content(field: Any) -> Any:
    """A text or a number; gguf before 0.17 has no function for it."""
    part = field.parts[field.data[-1]]
    return bytes(part).decode() if field.types[-1] == gguf.GGUFValueType.STRING else part[0].item()


def read_back(file: Path, base: Path) -> Iterator[tuple[str, Tensor]]:
    """B A by parameter of the model, as llama.cpp scales it and Transformers reads its weights."""
    if TRANSFORMERS_4:
        pytest.skip("Transformers 4 reads GGUF files by functions that svdtune does not use")
    reader = gguf.GGUFReader(file)
    fields = {name: content(field) for name, field in reader.fields.items() if field.types}
    assert fields["general.type"] == "adapter"
    assert fields["adapter.type"] == "lora"
    stored = {tensor.name: tensor for tensor in reader.tensors}
    model = AutoModelForCausalLM.from_pretrained(base)
    architecture = fields["general.architecture"]
    kind = "llama" if architecture in NEIGHBOURS else architecture
    processor = modeling_gguf.TENSOR_PROCESSORS.get(kind, modeling_gguf.TensorProcessor)(config=model.config.to_dict())
    names = modeling_gguf.get_gguf_hf_weights_map(model, processor, model_type=architecture)
    for name in {name.rpartition(".")[0] for name in stored}:
        A, B = stored[f"{name}.lora_a"].data, stored[f"{name}.lora_b"].data
        alpha = fields["adapter.lora.alpha"]
        change = B @ A * (alpha / len(A) if alpha else 1.0)
        back = processor.process(weights=change, name=name, tensor_key_mapping=names, parsed_parameters={})
        yield names[name], torch.tensor(back.weights)


def check_same(adapter: Path, base: Path, folder: Path) -> None:
    report = export_lora(adapter, folder / "adapter.gguf", to="gguf")
    export_lora(adapter, folder / "lora")
    expected, found = changes_in(folder / "lora"), dict(read_back(report.output, base))
    assert found.keys() == expected.keys()
    assert {name.removesuffix(".weight") for name in found} == report.ranks.keys()
    for name, change in found.items():
        torch.testing.assert_close(change, expected[name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", sorted(ARCHITECTURES))
def test_each_architecture_has_the_loras_change_under_llama_cpps_names(kind: str, tmp_path: Path) -> None:
    if kind not in known_architectures():
        pytest.skip(f"this gguf does not know {kind}")
    base = save_base(tmp_path / "base", kind)
    check_same(save_adapter(tmp_path / "adapter", base, SaraConfig(r=3, target_modules="all-linear")), base, tmp_path)


@pytest.mark.parametrize("method", METHODS)
def test_each_method_and_scale(method: str, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    check_same(save_adapter(tmp_path / "adapter", base, METHODS[method]), base, tmp_path)


def test_an_output_head_of_its_own(tmp_path: Path) -> None:
    """PEFT saves the base's weight beside what is trained there."""
    base = save_base(tmp_path / "base")
    config = LoraConfig(r=2, target_modules=["q_proj", "lm_head"])
    adapter = save_adapter(tmp_path / "adapter", base, config)
    assert "base_model.model.lm_head.base_layer.weight" in load_file(adapter / "adapter_model.safetensors")
    check_same(adapter, base, tmp_path)


def test_what_llama_cpp_does_not_take_is_refused(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    tied = save_base(tmp_path / "tied", tie_word_embeddings=True)
    wide = save_base(tmp_path / "wide", hidden_size=64, head_dim=16)
    other = save_base(tmp_path / "other", "gpt_neox")
    adapter = save_adapter(tmp_path / "adapter", base, SaraConfig(r=2))
    saved = save_adapter(tmp_path / "saved", base, SaraConfig(r=2, modules_to_save=["norm"]))
    head = save_adapter(tmp_path / "head", base, SaraConfig(r=2, target_modules=["q_proj", "lm_head"]))
    refused = {
        r"also trains model\.\S+ and llama.cpp takes low-rank changes alone": (saved, base),
        "no weight of its own for the layer 'lm_head'": (head, tied),
        r"q_proj' is 32 × 32, and in the base \S+ it is 64 × 64": (adapter, wide),
        "is of the type 'gpt_neox', whose LoRA is not written as GGUF": (adapter, other),
    }
    for number, (words, (given, named)) in enumerate(refused.items()):
        lora = export_lora(given, tmp_path / f"lora-{number}").output
        with pytest.raises(SvdtuneError, match=words):
            write_gguf(lora, tmp_path / "adapter.gguf", str(named))
    settings = json.loads((lora / "adapter_config.json").read_text())
    for nameless in (settings | {"base_model_name_or_path": None}, settings | {"base_model_name_or_path": ""}):
        (lora / "adapter_config.json").write_text(json.dumps(nameless))
        with pytest.raises(SvdtuneError, match=r"does not name its base model, .* give it, --base MODEL"):
            write_gguf(lora, tmp_path / "adapter.gguf")
    with pytest.raises(SvdtuneError, match="'lora' or 'gguf'; got 'ggml'"):
        export_lora(adapter, tmp_path / "adapter.ggml", to="ggml")
    assert not list(tmp_path.glob("adapter.g*"))


def test_the_verb_writes_one_file_and_replaces_none(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    adapter = save_adapter(tmp_path / "adapter", base, SorsaConfig(threshold=0.3))
    words = ["export", str(adapter), "--to", "gguf", "--output", str(tmp_path / "adapter.gguf")]
    first, second = (CliRunner().invoke(cli.app, words) for _ in range(2))
    assert first.exit_code == 0, first.output
    assert "no loss" in first.stdout
    assert "adapter.gguf: LoRA of rank" in first.stdout
    assert "note" not in first.stdout
    assert second.exit_code == 2
    assert "is there already, and nothing is overwritten" in second.stderr
