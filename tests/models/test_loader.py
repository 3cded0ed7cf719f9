"""Loading: what can be named, in which dtype, and one clear error for what cannot be."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

from svdtune.errors import SvdtuneError
from svdtune.models import load, load_tokenizer
from svdtune.models.loader import locate
from tiny import tiny_gpt2


def test_a_folder_loads_with_its_tokenizer(tiny_folder: Path) -> None:
    loaded = load(tiny_folder)
    assert loaded.name == str(tiny_folder)
    assert not loaded.model.training
    assert loaded.model.dtype == torch.float32
    assert loaded.tokenizer.decode(loaded.tokenizer.encode("any text")) == "any text"


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_the_dtype_can_be_a_name(tiny_folder: Path, dtype: str | torch.dtype) -> None:
    assert load(tiny_folder, dtype=dtype).model.dtype == torch.bfloat16


def test_the_end_token_can_be_set_while_loading(tiny_folder: Path) -> None:
    loaded = load(tiny_folder, end_token="!")
    assert (
        loaded.model.config.eos_token_id == loaded.tokenizer.eos_token_id == loaded.tokenizer.convert_tokens_to_ids("!")
    )


def test_a_tokenizer_without_padding_pads_with_its_end_token(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    plain = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer.backend_tokenizer, eos_token="<|end|>")
    plain.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (tmp_path / "model.safetensors").touch()
    assert load_tokenizer(tmp_path).pad_token == "<|end|>"


def test_a_folder_without_a_tokenizer_is_refused_where_transformers_makes_an_empty_one(tmp_path: Path) -> None:
    tiny_gpt2().save_pretrained(tmp_path)
    with pytest.raises(
        SvdtuneError, match=r"the tokenizer of .* (knows no words: its files are missing|cannot be loaded)"
    ):
        load_tokenizer(tmp_path)


def test_a_path_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(SvdtuneError, match=r"there is no model at .*nowhere"):
        load(tmp_path / "nowhere")
    with pytest.raises(SvdtuneError, match=r"there is no model at .*nowhere\.gguf"):
        load("nowhere.gguf")


def test_a_hub_name_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(SvdtuneError, match="'nobody/nothing' cannot be loaded"):
        load("nobody/nothing")


def test_a_checkpoint_that_lacks_a_weight(tiny_folder: Path, tmp_path: Path) -> None:
    """Transformers would draw it at random, and only warn."""
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weighu"] = weights.pop("model.norm.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SvdtuneError, match=r"lacks 1 of its weights, 'model\.norm\.weight' among them: its files are"):
        load(folder)


def test_a_model_beside_an_adapter_is_refused(
    tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Transformers would load both, and say nothing."""
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    get_peft_model(load(folder).model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(folder)
    for read in (load, locate):
        with pytest.raises(
            SvdtuneError, match=r"holds a model and an adapter \(adapter_config\.json\).*would load both"
        ):
            read(folder)
    monkeypatch.setattr("svdtune.models.loader._check_folder", bool)  # as with a hub's name
    with pytest.raises(SvdtuneError, match="holds a model and an adapter"):
        load(folder)


@pytest.mark.parametrize(
    "where", ["model.norm.weight", "model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"]
)
def test_weights_that_are_no_numbers(
    tmp_path: Path, tiny_folder: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors[where].view(-1)[-1] = torch.nan
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(SvdtuneError, match=f"holds NaN in '{where}'.*Download it again, or take another checkpoint"):
        load(folder)
    # a process that is to be sent its weights holds whatever was in memory until then
    monkeypatch.setattr("svdtune.models.loader.has_weights", lambda model: False)
    load(folder)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"config.json": ...}, r"has no weights: expected model\.safetensors .* found config\.json"),
        ({}, r"has no config\.json; it holds nothing"),
        (
            {"adapter_config.json": '{"base_model_name_or_path": "some/base"}'},
            "is an adapter, not a model; its base model is 'some/base'",
        ),
        ({"adapter_config.json": "["}, r"adapter_config\.json is damaged"),
        ({"config.json": ..., "model.safetensors": "not safetensors"}, "cannot be loaded"),
        # Transformers would do without it
        (
            {"config.json": ..., "model.safetensors": ..., "generation_config.json": "{"},
            r"generation_config\.json is damaged: Expecting",
        ),
    ],
    ids=["weights", "nothing", "adapter", "damaged-adapter", "damaged-weights", "damaged-decoding"],
)
def test_a_folder_that_is_no_whole_model(files: dict, message: str, tiny_folder: Path, tmp_path: Path) -> None:
    """Of files a text, or the model's own."""
    for name, text in files.items():
        (tmp_path / name).write_bytes((tiny_folder / name).read_bytes() if text is ... else text.encode())
    with pytest.raises(SvdtuneError, match=message):
        load(tmp_path)


def test_an_unknown_dtype_is_refused(tiny_folder: Path) -> None:
    with pytest.raises(SvdtuneError, match="dtype 'int8' is none: expected auto, float32"):
        load(tiny_folder, dtype="int8")
