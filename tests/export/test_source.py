"""What a command may be given, and adapters that do not belong to the model."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from svdtune.errors import SvdtuneError
from svdtune.export import Source, attach_adapter, find_source, open_source
from svdtune.models import load
from svdtune.training.recipe import check_recipe, dump_recipe

RECIPE = {
    "method": {"name": "lora"},
    "data": {"train": "arithmetic"},
    "training": {"learning_rate": 1e-3},
    "output": {"dir": "run"},
}


@pytest.fixture
def adapter(tiny_folder: Path, tmp_path: Path) -> Path:
    """A LoRA adapter of the tiny model that changes its outputs."""
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(load(tiny_folder).model, config).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_run_adapter_and_model_folders_are_told_apart(tiny_folder: Path, adapter: Path) -> None:
    run = adapter.parent
    assert find_source(adapter) == Source(str(tiny_folder), adapter)
    recipe = check_recipe(RECIPE | {"model": str(tiny_folder)})
    (run / "recipe.yaml").write_text(dump_recipe(recipe))
    (run / "training.json").write_text("{}")
    assert find_source(run) == Source(str(tiny_folder), adapter, run, recipe)
    (run / "model").mkdir()
    assert find_source(run) == Source(str(run / "model"), None, run, recipe)
    assert find_source(tiny_folder) == Source(str(tiny_folder))
    assert find_source(tiny_folder, adapter) == Source(str(tiny_folder), adapter)
    assert find_source("owner/model") == Source("owner/model")


def test_opening_puts_the_adapter_on(tiny_folder: Path, adapter: Path) -> None:
    loaded = open_source(find_source(adapter))
    assert isinstance(loaded.model, PeftModel)
    assert not loaded.model.training
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        adapted = loaded.model(ids).logits
        with loaded.model.disable_adapter():
            base = loaded.model(ids).logits
        assert torch.equal(base, open_source(Source(str(tiny_folder))).model(ids).logits)
    assert not torch.allclose(adapted, base)


def test_unusable_folders_are_refused(tiny_folder: Path, adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text("")
    with pytest.raises(SvdtuneError, match="is not finished"):
        find_source(tmp_path / "run")
    with pytest.raises(SvdtuneError, match="brings its own adapter"):
        find_source(adapter, adapter)
    with pytest.raises(SvdtuneError, match="does not exist"):
        find_source(tiny_folder, tmp_path / "nowhere")
    with pytest.raises(SvdtuneError, match=r"it has no adapter_config\.json"):
        find_source(tiny_folder, tmp_path)
    with pytest.raises(SvdtuneError, match="there is no model at"):
        open_source(find_source(tmp_path / "nowhere"))


def test_damaged_adapters_are_refused(tiny_folder: Path, adapter: Path) -> None:
    weights = adapter / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SvdtuneError, match=r"adapter_model\.safetensors is missing, cut short or damaged"):
        open_source(find_source(adapter))
    weights.unlink()
    with pytest.raises(SvdtuneError, match=r"has no adapter_model\.safetensors"):
        open_source(find_source(adapter))
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    with pytest.raises(SvdtuneError, match="does not name its base model"):
        find_source(adapter)
    (adapter / "adapter_config.json").write_text("{")
    with pytest.raises(SvdtuneError, match="is damaged"):
        find_source(adapter)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 1}, r"4 weights do not match \(the model has no place for .*layers\.1\."),
        ({"num_hidden_layers": 3}, r"4 weights do not match \(the file lacks .*layers\.2\."),
        ({"hidden_size": 64}, "does not fit this model: .*size mismatch"),
    ],
)
def test_an_adapter_of_another_model_is_refused(tiny_folder: Path, adapter: Path, change: dict, message: str) -> None:
    other = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tiny_folder, **change))
    with pytest.raises(SvdtuneError, match=message):
        attach_adapter(other, adapter)


def test_an_adapter_that_lacks_a_tensor_is_refused(tiny_folder: Path, adapter: Path) -> None:
    weights = load_file(adapter / "adapter_model.safetensors")
    weights.popitem()
    save_file(weights, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SvdtuneError, match=r"1 weights do not match \(the file lacks"):
        open_source(find_source(adapter))
