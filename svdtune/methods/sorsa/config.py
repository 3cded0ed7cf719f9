"""SorsaConfig: SORSA's settings."""

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from svdtune.errors import SvdtuneError
from svdtune.linalg import BANDS, Components
from svdtune.methods.config import SvdConfig, is_number_in, one_of
from svdtune.spectra import matrix_shape

DEFAULT_R = 64


@dataclass
class SorsaConfig(SvdConfig):
    """SORSA: trains the leading singular values and vectors of the weight itself, kept near
    orthonormal.

    Adapts all linear layers but the output head by default, at r = 64 (the paper has 128 for Llama
    2, 64 for the others). The regularizer does not act by itself: `svdtune.SorsaRegularizer`
    applies it at the optimizer step.

    Args:
        layout: "delta" leaves the weight alone and adds the change of its principal part. "split"
            (the paper's letter): the base checkpoint is the residual W_r, quantized or not, and the
            adapter adds the whole principal part; only adapters that `svdtune.export.split` wrote
            have it.
        gamma: strength γ of the orthonormal regularizer (Eq. 6), 0 turns it off.
        reduction: "mean" of the penalty over all factor matrices (the authors' code) or their "sum"
            (Eq. 4).
        components: which singular triplets are trained: the "first" r (the paper's), the "middle"
            or the "last" ones, or those from number start up to stop, (start, stop), counted from 0
            at the largest; then r = stop − start.
        smooth_eps: ε of the smooth penalty gradient E / √(‖E‖² + ε²); 0 is Eq. 4, whose gradient
            jumps at 0.
        See `svdtune.methods.config.SvdConfig` for r, threshold, rank_pattern and the rest.
    """

    method: ClassVar[str] = "sorsa"

    layout: str = field(
        default="delta", metadata={"help": "delta adds to the whole weight, split to a residual checkpoint."}
    )
    components: str | list[int] | tuple[int, int] = field(
        default="first", metadata={"help": "Which singular triplets: first, middle, last, or [start, stop]."}
    )
    gamma: float = field(default=4e-4, metadata={"help": "Strength of the orthonormal regularizer."})
    reduction: str = field(default="mean", metadata={"help": "mean (authors' code) or sum (Eq. 4) over factors."})
    smooth_eps: float = field(default=0.0, metadata={"help": "ε that smooths the penalty's gradient at 0."})

    def __post_init__(self) -> None:
        if not isinstance(self.components, str) and _is_band(self.components):
            self.components = list(self.components)
        if self.r is None and self.threshold is None:
            self.r = DEFAULT_R if isinstance(self.components, str) else _length(self.components)
        if self.initialized:
            self.layout = stored_layout(self.layout)
        super().__post_init__()

    def _problems(self) -> Iterator[str]:
        yield from super()._problems()
        if self.layout == "residual":
            yield (
                "layout='residual' changed the base model's weights in place, and is no longer there. Use layout='delta', the "
                "same function on weights that stay as they are; for a checkpoint that holds the residual itself, "
                "svdtune.export.split.split_checkpoint writes one, with its adapter in layout='split'"
            )
        elif self.layout == "split" and not self.initialized:
            yield (
                "layout='split' says that the base checkpoint was stored without its principal part; a new adapter cannot know "
                "it. Write both with svdtune.export.split.split_checkpoint and load the adapter that it wrote"
            )
        elif self.layout == "split" and self.target_parameters:
            yield "layout='split' is of layers, and `target_parameters` are none; use layout='delta' for experts"
        else:
            yield from one_of("layout", self.layout, ("delta", "split"))
        yield from self._problems_with_components()
        yield from one_of("reduction", self.reduction, ("mean", "sum"))
        for name in ("gamma", "smooth_eps"):
            if not is_number_in(getattr(self, name), 0, math.inf):
                yield f"`{name}` must be a number of at least 0; got {getattr(self, name)!r}"

    def _problems_with_components(self) -> Iterator[str]:
        given = self.components
        if isinstance(given, str):
            yield from one_of("components", given, BANDS)
        elif not _is_band(given):
            yield (
                f"`components` must be one of {', '.join(map(repr, BANDS))} or whole numbers (start, stop), "
                f"0 <= start < stop; got {given!r:.60}"
            )
        elif any(rank != _length(given) for rank in (self.r, *self.rank_pattern.values())):
            yield (
                f"`components` ({given[0]}, {given[1]}) is {_length(given)} triplets in every layer, so no threshold, budget "
                "or other rank fits it; leave `r`, `threshold` and `rank_pattern` out, or name a part of the spectrum: "
                f"{', '.join(map(repr, BANDS))}"
            )

    @property
    def triplets(self) -> Components:
        return self.components

    def check_layer(self, name: str, layer: Any) -> None:
        """A layer must have the triplets that are asked for. An adapter in the split layout stands
        alone: another one would be added to a weight that lacks its principal part."""
        least = min(matrix_shape(layer))
        if not isinstance(self.components, str) and self.components[1] > least:
            raise SvdtuneError(
                f"layer {name!r} has {least} singular triplets, and `components` {tuple(self.components)} goes beyond "
                "them. Take an earlier band, or name the layer in `exclude_modules`"
            )
        layouts = [config.layout for config in getattr(layer, "configs", {}).values()]
        if layouts and "split" in (self.layout, *layouts):
            raise SvdtuneError(
                f"the weight of {name!r} was stored without its principal part (layout='split'), which one adapter adds, so "
                "no second adapter can stand on that layer. Load each adapter onto a model of its own"
            )


def _is_band(given: Any) -> bool:
    numbers = isinstance(given, list | tuple) and len(given) == 2 and all(type(number) is int for number in given)
    return numbers and 0 <= given[0] < given[1]


def _length(band: Sequence[int]) -> int:
    return band[1] - band[0] if _is_band(band) else DEFAULT_R


def stored_layout(layout: Any) -> Any:
    """The layout of a saved adapter, or of a run that was begun. Version 0.1's "residual" becomes
    "delta", with a warning.

    The tensors are the same, and so is the function, up to the rounding of W − P₀ V₀ᵀ to the
    weight's dtype.
    """
    if layout != "residual":
        return layout
    warnings.warn(
        "SORSA's layout='residual', which svdtune 0.1 wrote, is read as layout='delta': the same function, up to the rounding "
        "of the weights, and the base model stays as it is",
        UserWarning,
        stacklevel=3,
    )
    return "delta"
