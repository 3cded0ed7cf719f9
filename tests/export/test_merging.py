"""A merged checkpoint stands alone, gives the adapter's outputs, and appears only if it does."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from svdtune.errors import SvdtuneError
from svdtune.export import Source, find_source, merge, open_source
from svdtune.models import load


def save_adapter(base: Path, folder: Path) -> Path:
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(load(base).model, config).save_pretrained(folder)
    return folder


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

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert model.dtype == getattr(torch, dtype)
    assert report.dtype == dtype
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
    assert report.relative <= limit < report.effect


def test_a_checkpoint_with_other_outputs_is_not_kept(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A merge that forgets the adapter gives the base model: it must not pass."""
    adapter = save_adapter(tiny_folder, tmp_path / "adapter")
    monkeypatch.setattr(PeftModel, "merge_and_unload", lambda self, **_: self.unload(), raising=False)
    with pytest.raises(SvdtuneError, match="does not give the adapter's outputs"):
        merge(find_source(adapter), tmp_path / "out" / "merged")
    assert list((tmp_path / "out").iterdir()) == []


def test_weights_that_overflow_are_not_kept(tiny_folder: Path, tmp_path: Path) -> None:
    model = get_peft_model(load(tiny_folder).model, LoraConfig(r=1, target_modules=["q_proj"], init_lora_weights=False))
    with torch.no_grad():
        model.base_model.model.model.layers[0].self_attn.q_proj.lora_A.default.weight.fill_(float("inf"))
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(SvdtuneError, match="cannot be merged"):
        merge(find_source(tmp_path / "adapter"), tmp_path / "out" / "merged")
    assert not (tmp_path / "out").exists()


def test_refusals(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(SvdtuneError, match="nothing to merge"):
        merge(Source(str(tiny_folder)), tmp_path / "merged")
    adapter = save_adapter(tiny_folder, tmp_path / "adapter")
    with pytest.raises(SvdtuneError, match="not empty"):
        merge(find_source(adapter), adapter)
