"""An estimate of the memory that training takes on each device, checked against measured steps.

The peak is at the start of the backward pass, when every activation and the loss's work are there.
If the loss is small beside a decoder layer, the peak is in a layer's backward pass.
docs/planning.md compares the estimate with measured peaks.

Beside it, the host's memory for starting an adapter layer by layer: what the decomposition of one
weight holds.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from svdtune.errors import SvdtuneError
from svdtune.methods.sites import Site
from svdtune.planning.anatomy import Anatomy
from svdtune.planning.plan import Plan

# Bytes of a base weight. Four bits: bitsandbytes' nf4 with a 4-byte scale for 64 weights; eight:
# int8 and a scale a row.
BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "int8": 1.0, "int4": 0.5 + 4 / 64}
QUANTIZED = ("int8", "int4")
_EIGHT_BITS = 1 + 4 / 256  # a byte, and a 4-byte scale for 256 of them
# Bytes that an optimizer keeps for a trained number, by its name in Transformers; those that are
# not here keep what depends on shapes.
MOMENTS = {
    **dict.fromkeys(("adamw_torch", "adamw_torch_fused", "paged_adamw_32bit"), 8.0),
    **dict.fromkeys(("adamw_bnb_8bit", "adamw_8bit", "paged_adamw_8bit", "adamw_torch_8bit"), 2 * _EIGHT_BITS),
    "adamw_torch_4bit": 2 * (0.5 + 4 / 128),
    **dict.fromkeys(("ademamix", "paged_ademamix_32bit"), 12.0),
    **dict.fromkeys(("ademamix_8bit", "paged_ademamix_8bit"), 3 * _EIGHT_BITS),
    **dict.fromkeys(("lion_32bit", "paged_lion_32bit", "adagrad", "rmsprop", "rmsprop_bnb", "rmsprop_bnb_32bit"), 4.0),
    **dict.fromkeys(("lion_8bit", "paged_lion_8bit", "rmsprop_bnb_8bit"), _EIGHT_BITS),
    "sgd": 0.0,
}
MEASURED = ("sara", "mosara", "sorsa", "lora")  # methods; others are counted as LoRA
STRATEGIES = ("ddp", "zero2", "fsdp2", "zero3")
SHARDED = ("fsdp2", "zero3")
# cuBLAS keeps work space for itself, as PyTorch sets it on H100s.
_WORKSPACE = 64 * 2**20
# Of the decoder layers that sharding gathers: the one that computes, and the one that is fetched
# meanwhile.
_GATHERED = 2


@dataclass(frozen=True)
class Setting:
    """How a plan is trained.

    Attributes:
        strategy: "ddp" (or one device), "zero2", "fsdp2" or "zero3".
        devices: that share the work.
        batch_size: sequences that a device computes at once.
        length: tokens of a sequence.
        accumulation: batches a device goes through before a step of the optimizer.
        gradient_checkpointing: keep each decoder layer's input alone and compute the rest again.
        offload: keep what is sharded in the host's memory (fsdp2, zero3), or gradients and
            optimizer (zero2).
        dtype: of the frozen base's weights, one of `BYTES`; int8 and int4 are for the decoder
            layers' linear weights.
        optimizer: by its name in Transformers; one that is not in `MOMENTS` is counted as AdamW.

    Raises:
        SvdtuneError: a value that there is not, or a strategy that cannot offload.
    """

    strategy: str = "ddp"
    devices: int = 1
    batch_size: int = 1
    length: int = 512
    accumulation: int = 1
    gradient_checkpointing: bool = False
    offload: bool = False
    dtype: str = "bfloat16"
    optimizer: str = "adamw_torch"

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise SvdtuneError(f"strategy {self.strategy!r} is none of {', '.join(STRATEGIES)}")
        if self.dtype not in BYTES:
            raise SvdtuneError(f"dtype {self.dtype!r} is none of {', '.join(BYTES)}")
        for name in ("devices", "batch_size", "length", "accumulation"):
            if getattr(self, name) < 1:
                raise SvdtuneError(f"{name} must be at least 1; got {getattr(self, name)}")
        if self.offload and self.strategy == "ddp":
            raise SvdtuneError("ddp keeps everything on every device; offload with fsdp2, zero3 or zero2")

    @property
    def moments(self) -> float:
        """Bytes that the optimizer keeps for a trained number."""
        return MOMENTS.get(self.optimizer, MOMENTS["adamw_torch"])

    @property
    def tokens(self) -> int:
        """That a device computes at once."""
        return self.batch_size * self.length


@dataclass(frozen=True)
class Memory:
    """Bytes on each device, by what takes them, and in the host's memory beside them.

    Attributes:
        weights: the base model's, or this device's share.
        gathered: of sharded weights and factors, what is whole for a while: two decoder layers and
            the output head.
        adapter: its trained factors in fp32, with copies in the dtype of the products.
        frozen: its frozen factors.
        gradients: all of them, as accumulation has them beside the activations; under DDP twice,
            for its buckets.
        optimizer: its moments; ZeRO keeps a copy of the factors beside them.
        activations: what the forward pass keeps for the backward pass.
        logits: three copies in fp32: the probabilities and two gradients.
        temporaries: what a decoder layer's backward pass takes beyond the logits, dequantized
            weights, work space.
        host: what `offload` keeps there for one device.
    """

    weights: int
    gathered: int
    adapter: int
    frozen: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    temporaries: int
    host: int = field(default=0, kw_only=True)

    @property
    def parts(self) -> dict[str, int]:
        """What takes memory of a device, in bytes, by name."""
        return {name: size for name, size in vars(self).items() if name != "host"}

    @property
    def total(self) -> int:
        """All of a device's."""
        return sum(self.parts.values())


def estimate(sizes: Anatomy, setting: Setting) -> Memory:
    """Estimate training memory for a frozen base and an fp32 adapter under bf16 autocast."""
    base = weight_bytes(sizes, setting.dtype)
    sharded, zero = setting.strategy in SHARDED, setting.strategy.startswith("zero")
    share = setting.devices if sharded else 1
    split = setting.devices if setting.strategy != "ddp" else 1
    several_ddp = setting.strategy == "ddp" and setting.devices > 1
    stored = {
        "weights": base / share,
        "adapter": 4 * sizes.trained / share,
        "frozen": 4 * sizes.frozen / share,
        "gradients": 4 * sizes.trained / split * (2 if several_ddp else 1),
        "optimizer": (setting.moments + (4 if zero else 0)) * sizes.trained / split,
    }
    moved = set(stored) if sharded else {"gradients", "optimizer"}
    moved = moved if setting.offload else set()
    here = {name: 0 if name in moved else int(size) for name, size in stored.items()}
    here["adapter"] += 2 * sizes.copies // (sizes.depth if sharded else 1)
    gathered = sharded and (setting.devices > 1 or setting.offload)
    activations, logits, temporaries = _working(sizes, setting)
    return Memory(
        **here,
        gathered=_gathered(sizes, setting) if gathered else 0,
        activations=activations,
        logits=logits,
        temporaries=temporaries,
        host=int(sum(stored[name] for name in moved)),
    )


def weight_bytes(sizes: Anatomy, dtype: str) -> int:
    """Bytes of the whole base model; quantization leaves embeddings, norms and the output head in
    two bytes a number."""
    if dtype not in QUANTIZED:
        return int(BYTES[dtype] * sizes.parameters)
    return int(BYTES[dtype] * sizes.linear + 2 * (sizes.parameters - sizes.linear))


def block_bytes(sizes: Anatomy, dtype: str) -> int:
    """Bytes of one decoder layer with its part of the adapter, as sharding sends it."""
    share = min(1.0, sizes.linear / sizes.depth / sizes.block) if dtype in QUANTIZED else 0.0
    per_weight = BYTES[dtype] * share + (2 if dtype in QUANTIZED else BYTES[dtype]) * (1 - share)
    return int(per_weight * sizes.block + 4 * (sizes.trained + sizes.frozen) / sizes.depth)


def _gathered(sizes: Anatomy, setting: Setting) -> int:
    gradients = 4 * sizes.trained // sizes.depth
    head = (2 if setting.dtype in QUANTIZED else int(BYTES[setting.dtype])) * sizes.head
    return _GATHERED * block_bytes(sizes, setting.dtype) + gradients + head


def _working(sizes: Anatomy, setting: Setting) -> tuple[int, int, int]:
    """(activations, logits, temporaries).

    A decoder layer with norms in fp32, a fused attention kernel and a gated MLP keeps, in bytes per
    token: two copies of its inputs in fp32 (8 H), q, k, v and the attention's output (8 H, keys and
    values counted as often as they are used), gate, its activation and up (6 I), and two bytes for
    each number that the adapter keeps. Beside the layers, the embeddings' output and the last norm
    (6 H). A layer's backward pass works on gradients of the MLP (6 I) and of its inputs (10 H).
    Weights of fused experts with their adapters' additions are kept too, and have gradients.
    """
    H, wide, tokens = sizes.hidden, sizes.intermediate, setting.tokens
    changed = 2 * sizes.changed // sizes.depth
    layer = tokens * (16 * H + 6 * wide + 2 * sizes.kept // sizes.depth) + changed
    ends = 6 * H * tokens
    backward = tokens * (10 * H + 6 * wide) + changed
    logits = 12 * tokens * sizes.vocabulary
    if setting.gradient_checkpointing:
        kept, backward = sizes.depth * 2 * H * tokens, backward + layer
    else:
        kept = sizes.depth * layer
    dequantized = 2 * sizes.largest if setting.dtype in QUANTIZED else 0
    return kept + ends, logits, max(0, backward + dequantized - logits) + _WORKSPACE


# Python with torch, transformers and PEFT imported, and their work space.
_RUNTIME = 640 * 2**20
# Numbers in float64 [m, n] and [n, n], n the short side: the weight and its quotient by a power of
# two, or its product with the vectors; the Gram matrix, its mirrored copy, its eigenvectors and
# LAPACK's work space (2 n²).
_LONG, _SQUARE = 2, 6
# Of the factors [out + in, r] in float64: as found, orthonormalised, with signs; the start's own
# copies in fp32.
_FACTORS = 4


def initialisation_bytes(plan: Plan, model: PreTrainedModel) -> int:
    """The most host memory that `svdtune init` needs, by every route of a decomposition except
    LAPACK's SVD. That route is for weights without full rank, and takes some 30 bytes a number
    more.

    Args:
        plan: of a SARA, Mo-SARA or SORSA adapter, whose sites are started.
        model: on the meta device; its dtype is taken for the checkpoint's.
    """
    stored = next((p.dtype for p in model.parameters()), torch.float32)
    declared = getattr(model.config, "dtype", None)
    item = (declared if isinstance(declared, torch.dtype) else stored).itemsize
    return _RUNTIME + max(_one(site, model, item) for site in plan.sites)


def _one(site: Site, model: PreTrainedModel, item: int) -> int:
    assert site.shape is not None
    assert site.rank is not None
    long, short = max(site.shape), min(site.shape)
    read = long * short
    if not site.expert:  # of a slice, all of the projection is read
        whole = model.get_submodule(site.module).weight
        assert isinstance(whole, Tensor)
        read = whole.numel()
    # and its copy in bf16, of which the fingerprint is taken
    weight = item * read + 2 * long * short
    return weight + 8 * (_LONG * long * short + _SQUARE * short * short + _FACTORS * site.rank * (long + short))
