"""The real vLLM, where it is installed: the completions of an exported adapter are those of
Transformers."""

from pathlib import Path

import pytest
from peft import get_peft_model
from transformers import PreTrainedTokenizerFast

from svdtune import SorsaConfig
from svdtune.evaluation import Decoding
from svdtune.evaluation.generation import complete_batch
from svdtune.evaluation.vllm import open_vllm
from svdtune.export import find_source, open_source
from svdtune.models import load
from tiny import moved, save_tiny_llama

PROMPTS = [[70, 71, 72], [80], [90, 91]]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_sorsa_adapter_served_as_lora(
    tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    pytest.importorskip("vllm", reason="needs vLLM")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    save_tiny_llama(
        base,
        tiny_tokenizer,
        hidden_size=128,
        intermediate_size=128,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,  # vLLM's kernels have a least size
        max_position_embeddings=256,
        tie_word_embeddings=False,
        initializer_range=0.2,
    )
    model = get_peft_model(load(base).model, SorsaConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    moved(model, 0.05)
    model.save_pretrained(adapter)
    source = find_source(str(base), adapter)
    expected = complete_batch(open_source(source).model, PROMPTS, 12, [0], 1)
    assert expected != complete_batch(load(base).model, PROMPTS, 12, [0], 1), "the adapter changes nothing"
    with open_vllm(source, dtype="float32", max_model_len=128, enforce_eager=True) as engine:
        assert engine.complete(PROMPTS, 12, Decoding(), [0, 0, 0]) == expected
        drawn = [engine.complete(PROMPTS, 12, Decoding(temperature=1.0), [3, 4, 5]) for _ in range(2)]
        assert drawn[0] == drawn[1] != expected
