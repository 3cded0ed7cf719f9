"""Models known by their shape alone, for plans without a download: the configurations that their
authors published."""

from transformers import LlamaConfig

from svdtune.checkpoint.architecture import build_model
from svdtune.checkpoint.model import Checkpoint

# LLaMA: Touvron et al. 2023, arXiv:2302.13971, Table 2. Llama 2: arXiv:2307.09288, Table 1 and its
# published config.json. Llama 3.1: Grattafiori et al. 2024, arXiv:2407.21783, Table 3. Of each: (H,
# layers, heads, key-value heads, I, vocabulary).
_SIZES = {
    "llama-7b": (4096, 32, 32, 32, 11008, 32000),
    "llama-13b": (5120, 40, 40, 40, 13824, 32000),
    "llama-2-70b": (8192, 80, 64, 8, 28672, 32000),
    "llama-3.1-8b": (4096, 32, 32, 8, 14336, 128256),
    "llama-3.1-70b": (8192, 80, 64, 8, 28672, 128256),
    "llama-3.1-405b": (16384, 126, 128, 8, 53248, 128256),
}
_SHORT = {"llama-70b": "llama-2-70b", "llama-405b": "llama-3.1-405b"}
SHAPES = (*_SIZES, *_SHORT)


def open_shape(name: str, *, layers: int | None = None) -> Checkpoint:
    """The checkpoint of a model in `SHAPES`: its architecture on the meta device, and no weight to
    read.

    Args:
        name: one of `SHAPES`.
        layers: decoder layers, if other than the model's own.
    """
    hidden, depth, heads, key_value_heads, intermediate, vocabulary = _SIZES[_SHORT.get(name, name)]
    config = LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=layers or depth,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        intermediate_size=intermediate,
        vocab_size=vocabulary,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    model = build_model(config)
    return Checkpoint(name, model, {}, 2 * sum(parameter.numel() for parameter in model.parameters()))
