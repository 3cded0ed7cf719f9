"""The vLLM engine against a stand-in for the module `vllm` that records its calls and answers by
Transformers."""

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from svdtune import MoSaraConfig, SaraConfig, SorsaConfig, SvdtuneError
from svdtune.evaluation import Decoding, Item, evaluate, get_task
from svdtune.evaluation.generation import complete_batch
from svdtune.evaluation.vllm import open_vllm
from svdtune.export.source import find_source
from svdtune.models import load

PROMPTS = [[70, 71, 72], [80], [90, 91]]


class FakeLLM:
    """Loads the base model and the LoRA it is told of; keeps end tokens in its outputs, as vLLM
    does."""

    made: list["FakeLLM"]

    def __init__(self, model: str, dtype: str, **options: Any) -> None:
        self.model, self.dtype, self.options, self.requests = model, dtype, options, []
        self.ended = 0
        self.llm_engine = SimpleNamespace(engine_core=SimpleNamespace(shutdown=self.shutdown))
        FakeLLM.made.append(self)

    def shutdown(self) -> None:
        self.ended += 1

    def generate(self, prompts, sampling_params, *, use_tqdm, lora_request):
        self.requests.append((prompts, sampling_params, use_tqdm, lora_request))
        model = load(self.model).model
        if lora_request:
            model = PeftModel.from_pretrained(model, lora_request.path)
        outputs = []
        for prompt, parameters in zip(prompts, sampling_params, strict=True):
            [found] = complete_batch(
                model, [prompt["prompt_token_ids"]], parameters["max_tokens"], parameters["stop_token_ids"], 1
            )
            tokens = found.tokens + ([parameters["stop_token_ids"][0]] if found.ended else [])
            outputs.append(SimpleNamespace(outputs=[SimpleNamespace(token_ids=tokens)]))
        return outputs


@pytest.fixture(autouse=True)
def fake_vllm(monkeypatch: pytest.MonkeyPatch) -> type[FakeLLM]:
    vllm, lora, request = (ModuleType(name) for name in ("vllm", "vllm.lora", "vllm.lora.request"))
    vllm.LLM, vllm.SamplingParams, vllm.__version__ = FakeLLM, lambda **values: values, "0"
    request.LoRARequest = lambda name, number, path: SimpleNamespace(name=name, number=number, path=path)
    for module in (vllm, lora, request):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    FakeLLM.made = []
    return FakeLLM


def adapter_of(base: Path, config, folder: Path) -> Path:
    torch.manual_seed(1)
    model = get_peft_model(load(base).model, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter) if "lambda" not in name else 0.1)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("config", "rank"),
    [
        (None, None),
        (SorsaConfig(r=5, target_modules="all-linear", task_type="CAUSAL_LM"), 16),
        (SaraConfig(r=3, target_modules="all-linear", task_type="CAUSAL_LM"), 8),
        (LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"), 8),
    ],
    ids=["base", "sorsa", "sara", "lora"],
)
def test_completions_are_those_of_transformers(tiny_folder: Path, tmp_path: Path, config, rank: int | None):
    adapter = adapter_of(tiny_folder, config, tmp_path / "adapter") if config else None
    source = find_source(str(tiny_folder), adapter)
    model = load(tiny_folder).model
    model = PeftModel.from_pretrained(model, adapter) if adapter else model
    expected = complete_batch(model, PROMPTS, 8, [0], 1)
    with open_vllm(source, dtype="float32", max_model_len=512) as engine:
        assert engine.complete(PROMPTS, 8, Decoding(), [7, 8, 9]) == expected
        [llm] = FakeLLM.made
        assert (llm.model, llm.dtype) == (str(tiny_folder), "float32")
        serving = {"enable_lora": True, "max_lora_rank": rank} if rank else {}
        assert llm.options == {"max_model_len": 512, "revision": None, "trust_remote_code": False} | serving
        [(prompts, parameters, tqdm, request)] = llm.requests
        assert prompts == [{"prompt_token_ids": prompt} for prompt in PROMPTS]
        assert parameters[1] == {
            "temperature": 0.0, "top_p": 1.0, "seed": 8, "max_tokens": 8, "stop_token_ids": [0], "detokenize": False,
        }  # fmt: skip
        assert not tqdm
        if adapter:
            assert json.loads((Path(request.path) / "adapter_config.json").read_text())["peft_type"] == "LORA"
        else:
            assert request is None
        assert llm.ended == 0
    assert llm.ended == 1


def test_a_whole_evaluation_through_the_interface(tiny_folder: Path, tmp_path: Path):
    source = find_source(str(tiny_folder))
    with open_vllm(source) as engine:
        items = [Item(str(i), "", tuple(prompt), "4") for i, prompt in enumerate(PROMPTS)]
        result = evaluate(engine, items, get_task("number"), tmp_path / "out", max_new_tokens=4)
        assert (result.n, result.settings["engine"], result.settings["vllm"]) == (3, "vllm", "0")
        # Another engine's predictions are not continued.
        with pytest.raises(SvdtuneError, match="other settings"):
            evaluate(load(tiny_folder), items, get_task("number"), tmp_path / "out", max_new_tokens=4)
        with pytest.raises(SvdtuneError, match="without beams"):
            engine.complete(PROMPTS, 4, Decoding(beams=2), [0, 0, 0])


def test_other_weights_have_another_identity(tiny_folder: Path, tmp_path: Path):
    config = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    adapter = adapter_of(tiny_folder, config, tmp_path / "adapter")
    found = []
    for scale in (1.0, 1.0, 1.01):
        weights = {name: scale * tensor for name, tensor in load_file(adapter / "adapter_model.safetensors").items()}
        save_file(weights, adapter / "adapter_model.safetensors")
        with open_vllm(find_source(str(tiny_folder), adapter)) as engine:
            found.append(engine.identity()["weights"])
    with open_vllm(find_source(str(tiny_folder))) as engine:
        found.append(engine.identity()["weights"])
    assert found[0] == found[1]
    assert len(set(found)) == 3


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MoSaraConfig(r=3, num_heads=2, target_modules="all-linear"), "head"),
        (SaraConfig(r=3, target_modules="all-linear", modules_to_save=["norm"]), "modules_to_save"),
    ],
    ids=["heads", "saved-module"],
)
def test_what_vllm_cannot_serve_is_refused(tiny_folder: Path, tmp_path: Path, config, message: str):
    adapter = adapter_of(tiny_folder, config, tmp_path / "adapter")
    with pytest.raises(SvdtuneError, match=message), open_vllm(find_source(str(tiny_folder), adapter)):
        pass
    assert FakeLLM.made == []


def test_a_missing_vllm_is_named(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(SvdtuneError, match="needs vLLM"), open_vllm(find_source(str(tiny_folder))):
        pass
