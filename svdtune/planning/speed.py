"""An estimate of a training step's time on H100s, from the steps that were measured on one.

Arithmetic, per token: a frozen base takes 2 P multiplications and additions forward and 2 P
backward (P: the linear weights and the output head), an attention layer 2 L H forward and 5 L H
backward (causal, recomputed by the fused kernel), and gradient checkpointing one more forward pass.
It is divided by the rate that the frozen base reached in a measured step. To this comes what an
adapter added in a measured step of its method, scaled by the widths Σ (in + out) that its products
read and write.
"""

from dataclasses import dataclass

from svdtune.planning.anatomy import Anatomy
from svdtune.planning.memory import SHARDED, Setting, block_bytes

# From benchmarks/results/step-llama-7b-h100.jsonl, 8 layers of LLaMA-7B's shapes, 16 × 512 tokens,
# bf16, H100 80GB HBM3: multiplications and additions a second of the frozen base, 41 % of the
# 989e12 that NVIDIA states for dense bf16.
FLOPS = 4.08e14
# The same: seconds over the frozen base per token and number of Σ (in + out), regularizer and
# optimizer included. SARA, SORSA and LoRA with r = 128 on all linear layers (smaller ranks take
# less), Mo-SARA with k = 914 and 5 heads on q and v.
OVER_FLOOR = {"sara": 2.37e-12, "sorsa": 3.60e-12, "lora": 1.01e-11, "mosara": 1.03e-11}
# Not measured: how far another shape or machine may lie off.
MARGIN = 0.25
# Not measured: bytes a second that a device receives from the others (NVLink within a host), and
# from the host's memory.
LINK, HOST = 2e11, 2e10
# Below this H a GPU waits for its launches, and a step takes several times what its arithmetic
# does.
_LAUNCH_BOUND = 2048
# Tokens that a device computed at once in the measured steps.
_MEASURED_TOKENS = 8192


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step of the optimizer, estimated.

    Attributes:
        base: the frozen base's passes.
        adapter: what the adapter adds.
        communication: of weights and gradients, if nothing else went on meanwhile.
        low, high: from all communication hidden behind arithmetic and a margin below, to none and a
            margin above.
        tokens: of all devices in a step.
        notes: what the estimate does not cover.
    """

    base: float
    adapter: float
    communication: float
    tokens: int
    notes: tuple[str, ...]

    @property
    def seconds(self) -> float:
        """With communication hidden as far as there is arithmetic to hide it behind."""
        return max(self.base + self.adapter, self.communication)

    @property
    def low(self) -> float:
        """The least that is to be expected."""
        return max((1 - MARGIN) * (self.base + self.adapter), self.communication)

    @property
    def high(self) -> float:
        """The most that is to be expected."""
        return (1 + MARGIN) * (self.base + self.adapter) + self.communication


def step_time(sizes: Anatomy, setting: Setting, *, link: float = LINK) -> StepTime:
    """Estimate a step's time on H100s.

    Args:
        sizes: of a plan and its model.
        setting: how it is trained.
        link: bytes a second that a device receives from the others.
    """
    tokens = setting.tokens * setting.accumulation
    again = setting.gradient_checkpointing
    over_floor = OVER_FLOOR.get(sizes.method, OVER_FLOOR["lora"])
    adapter = tokens * sizes.widths * over_floor * (4 / 3 if again else 1)
    notes = []
    if sizes.method not in OVER_FLOOR:
        notes.append(f"{sizes.method} was not measured; memory and time are counted as LoRA's")
    if sizes.hidden < _LAUNCH_BOUND:
        notes.append(f"H = {sizes.hidden} is so small that a GPU waits for its launches: expect several times this")
    if setting.tokens < _MEASURED_TOKENS // 2:
        notes.append(f"measured with {_MEASURED_TOKENS:,} tokens at once; so few as {setting.tokens:,} fill a GPU less")
    if setting.dtype not in ("bfloat16", "float16"):
        notes.append(f"measured with a bf16 base; what {setting.dtype} costs beside that was not, and is left out")
    if setting.devices > 1 or setting.offload:
        notes.append("the rates of links are assumed, not measured")
    return StepTime(
        base=floor_flops(sizes, tokens, setting.length, again) / FLOPS,
        adapter=adapter,
        communication=_communication(sizes, setting, link),
        tokens=tokens * setting.devices,
        notes=tuple(notes),
    )


def floor_flops(sizes: Anatomy, tokens: int, length: int, checkpointing: bool = False) -> float:
    """Multiplications and additions of a frozen base's forward and backward pass; see the head of
    this file."""
    weights, attention = sizes.linear + sizes.head, sizes.depth * length * sizes.hidden
    forward = 2 * weights + 2 * attention
    return tokens * (forward + 2 * weights + 5 * attention + (forward if checkpointing else 0))


def _communication(sizes: Anatomy, setting: Setting, link: float) -> float:
    """Seconds: shards are gathered forward and backward in every batch; gradients are summed, and
    passed on, once a step."""
    n, rest = setting.devices, (setting.devices - 1) / setting.devices
    gathers = 2 * setting.accumulation if setting.strategy in SHARDED else 0
    weights = gathers * sizes.depth * block_bytes(sizes, setting.dtype)
    gradients = 4 * sizes.trained * (setting.accumulation if setting.strategy in SHARDED else 2)
    seconds = rest * (weights + gradients) / link
    if setting.offload:
        moved = weights / n if setting.strategy in SHARDED else 0
        seconds += (moved + 8 * sizes.trained / n) / HOST
    return seconds
