"""An estimate of the memory that training a plan takes; a guide for choosing batch and length, not a measurement."""

from dataclasses import dataclass

from transformers import PretrainedConfig

from svdtune.planning.plan import Plan


@dataclass(frozen=True)
class Memory:
    """Bytes, by what takes them."""

    weights: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(vars(self).values())


def estimate(
    plan: Plan,
    config: PretrainedConfig,
    *,
    batch_size: int = 1,
    length: int = 512,
    bytes_per_weight: float = 2.0,
    gradient_checkpointing: bool = False,
) -> Memory:
    """Estimate training memory for a frozen base in `bytes_per_weight`, an fp32 adapter and AdamW.

    Activations count what a decoder layer with a fused attention kernel keeps for the backward pass through a frozen
    base, in two bytes a number: per token two normalised inputs and their residuals (6 H), q, k, v and the attention's
    output (2 H + 2 KV), and gate, up and their product (3 I); with gradient checkpointing one H a layer and one layer in
    full. Logits count three copies, one in the compute dtype and two in fp32. Fragmentation and work space are left out.
    """
    text = config.get_text_config()
    hidden = text.hidden_size
    intermediate = getattr(text, "intermediate_size", None) or 4 * hidden
    heads = getattr(text, "num_attention_heads", 1)
    key_value = hidden * (getattr(text, "num_key_value_heads", None) or heads) // heads
    tokens, depth = batch_size * length, text.num_hidden_layers
    layer = 2 * tokens * (8 * hidden + 2 * key_value + 3 * intermediate)
    activations = depth * 2 * tokens * hidden + layer if gradient_checkpointing else depth * layer
    return Memory(
        weights=int(plan.base_parameters * bytes_per_weight),
        adapter=4 * (plan.trained + plan.frozen),
        gradients=4 * plan.trained,
        optimizer=8 * plan.trained,
        activations=activations,
        logits=tokens * text.vocab_size * (2 + 4 + 4),
    )
