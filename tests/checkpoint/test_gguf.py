"""A GGUF file planned for as the model that Transformers makes of it."""

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from releases import TRANSFORMERS_4
from svdtune import SaraConfig
from svdtune.checkpoint import open_checkpoint
from svdtune.errors import SvdtuneError
from svdtune.linalg import rank_at_threshold
from svdtune.methods.sites import sites
from tiny import tiny_llama

gguf = pytest.importorskip("gguf")

pytestmark = pytest.mark.skipif(TRANSFORMERS_4, reason="Transformers 4 reads no GGUF file of today's")

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def permuted(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """The order of rows that llama.cpp keeps q and k in."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


@pytest.fixture
def model():
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_key_value_heads": 2, "vocab_size": 64}
    return tiny_llama(**sizes, tie_word_embeddings=True).train()


@pytest.fixture
def file(model, tmp_path):
    path = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    config = model.config
    writer.add_context_length(64)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tensor("token_embd.weight", model.model.embed_tokens.weight.detach().numpy())
    writer.add_tensor("output_norm.weight", model.model.norm.weight.detach().numpy())
    for depth, block in enumerate(model.model.layers):
        for ours, theirs in NAMES.items():
            weight = block.get_submodule(ours).weight.detach()
            heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(theirs)
            weight = (permuted(weight, heads) if heads else weight).numpy()
            name = f"blk.{depth}.{theirs}.weight"
            if weight.ndim == 2:
                packed = gguf.quants.quantize(weight, gguf.GGMLQuantizationType.Q8_0)
                writer.add_tensor(name, packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
            else:
                writer.add_tensor(name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_weights_are_read_dequantized_and_in_transformers_order(file, model):
    checkpoint = open_checkpoint(file)
    for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj"):
        weight = model.model.layers[1].get_submodule(name).weight.detach()
        found = checkpoint.weight(f"model.layers.1.{name}")
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, weight, rtol=0, atol=float(weight.abs().max()) / 127)


def test_ranks_are_those_of_the_dequantized_weights(file):
    checkpoint = open_checkpoint(file)
    found = sites(checkpoint, SaraConfig(threshold=0.3, target_modules="all-linear"))
    assert len(found) == 14
    for site in found:
        values = torch.linalg.svdvals(site.weight(checkpoint).double())
        assert site.rank == rank_at_threshold(values, 0.3)


def test_what_is_no_gguf_file_is_refused(tmp_path):
    (tmp_path / "fake.gguf").write_bytes(np.zeros(100, dtype=np.uint8).tobytes())
    with pytest.raises(SvdtuneError, match="cannot be read as a GGUF model"):
        open_checkpoint(tmp_path / "fake.gguf")


@given(at=st.integers(0, 1500), put_in=st.binary(min_size=1, max_size=8))
@example(at=139, put_in=b"\x02")
@example(at=390, put_in=b"\x02")
@example(at=142, put_in=b"[")
@example(at=172, put_in=b"\xff\xff\xff\x7f")
@pytest.mark.slow
def test_a_damaged_header_is_a_plan_or_one_message(file, at, put_in):
    whole = file.read_bytes()
    file.write_bytes(whole[:at] + put_in + whole[at + len(put_in) :])
    try:
        assert (message := refusal(file)) is None or "download" in message
    finally:
        file.write_bytes(whole)


def refusal(path):
    try:
        open_checkpoint(path)
    except SvdtuneError as error:
        return str(error)
    return None
