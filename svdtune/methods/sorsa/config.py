"""SorsaConfig: SORSA's settings."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

from svdtune.errors import SvdtuneError
from svdtune.methods.config import SvdConfig, is_number_in, one_of
from svdtune.methods.layers.quantized import is_quantized

DEFAULT_R = 64


@dataclass
class SorsaConfig(SvdConfig):
    """SORSA: trains the leading singular values and vectors of the weight itself, kept near orthonormal.

    Adapts all linear layers but the output head by default, at r = 64 (the paper has 128 for Llama 2, 64 for the others).
    The regularizer does not act by itself: `svdtune.SorsaRegularizer` applies it at the optimizer step.

    Args:
        layout: "delta" leaves the weight alone and adds the change of its principal part. "residual" (the paper's letter)
            subtracts the principal part from the weight in place; in bf16 and fp16 that rounds the weight. "split": the base
            checkpoint is a residual already, quantized or not; only adapters that `svdtune.export.split` wrote have it.
        gamma: strength γ of the orthonormal regularizer (Eq. 6), 0 turns it off.
        reduction: "mean" of the penalty over all factor matrices (the authors' code) or their "sum" (Eq. 4).
        smooth_eps: ε of the smooth penalty gradient E / √(‖E‖² + ε²); 0 is Eq. 4, whose gradient jumps at 0.
        See `svdtune.methods.config.SvdConfig` for r, threshold, rank_pattern and the rest.
    """

    method: ClassVar[str] = "sorsa"

    layout: str = field(
        default="delta", metadata={"help": "delta leaves the weight alone, residual changes it, split was changed."}
    )
    gamma: float = field(default=4e-4, metadata={"help": "Strength of the orthonormal regularizer."})
    reduction: str = field(default="mean", metadata={"help": "mean (authors' code) or sum (Eq. 4) over factors."})
    smooth_eps: float = field(default=0.0, metadata={"help": "ε that smooths the penalty's gradient at 0."})

    def __post_init__(self) -> None:
        if self.r is None and self.threshold is None:
            self.r = DEFAULT_R
        super().__post_init__()

    def _problems(self) -> Iterator[str]:
        yield from super()._problems()
        yield from one_of("layout", self.layout, ("delta", "residual", "split"))
        yield from one_of("reduction", self.reduction, ("mean", "sum"))
        for name in ("gamma", "smooth_eps"):
            if not is_number_in(getattr(self, name), 0, math.inf):
                yield f"`{name}` must be a number of at least 0; got {getattr(self, name)!r}"

    def check_base_layer(self, name: str, base: Any, shared: bool) -> None:
        """The residual layout changes the weight in place: not one that is quantized, nor one that others use too."""
        if self.layout == "split" and not self.initialized:
            raise SvdtuneError(
                "layout='split' says that the base checkpoint has lost its principal part already; a new adapter cannot know "
                "it. Write both with svdtune.export.split.split_checkpoint and load the adapter that it wrote"
            )
        if self.layout != "residual":
            return
        if is_quantized(getattr(base, "whole", base)):
            raise SvdtuneError(
                f"layout='residual' subtracts from the weight, but {name!r} is quantized. Use layout='delta', which leaves the "
                "weight alone, or split the unquantized model first and quantize its residual: "
                "svdtune.export.split.split_checkpoint"
            )
        weight = getattr(base, "weight", None)
        if hasattr(weight, "ds_id") or hasattr(weight, "full_tensor"):
            raise SvdtuneError(
                f"layout='residual' subtracts from the weight, but that of {name!r} is spread over processes already. Use "
                "layout='delta', which leaves the weight alone"
            )
        if shared:
            raise SvdtuneError(
                f"layout='residual' subtracts from the weight of {name!r}, but other modules have the same weight (an output "
                "head tied to the embeddings, for example) and would change too. Use layout='delta', which leaves the weight "
                "alone, or name the layer in `exclude_modules`"
            )
