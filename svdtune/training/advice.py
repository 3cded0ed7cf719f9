"""What a run's batch settings cost a GPU: whether it would wait for launches rather than compute,
and what to do about it."""

from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from svdtune.methods.compute.together import SMALL_LAYER


def launch_bound(model: nn.Module, batch_size: int, tokens: float) -> str | None:
    """A sentence of advice where the layers' products are shorter than the launches around them;
    None elsewhere.
    """
    layers: list[Any] = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    sizes = [layer.in_features * layer.out_features for layer in layers if hasattr(layer, "in_features")]
    if not sizes:
        return None
    per_row = tokens * sum(sizes) / len(sizes)
    if batch_size * per_row >= SMALL_LAYER:
        return None
    enough = round(SMALL_LAYER / per_row)
    return (
        f"{batch_size} rows of about {tokens:.0f} tokens are too few for this GPU: it waits for launches. Up to "
        f"training.batch_size: {enough} a pass takes hardly longer (lower training.gradient_accumulation to match); "
        "training.compile: true spares launches, after half a minute of compiling"
    )
