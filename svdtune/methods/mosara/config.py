"""MoSaraConfig: Mo-SARA's settings."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

from svdtune.methods.config import SvdConfig, one_of
from svdtune.methods.mosara.gates import GATES, has_router


@dataclass
class MoSaraConfig(SvdConfig):
    """Mo-SARA: frozen singular vectors, parallel sets of trained singular values, and a token-level
    router.

    Adapts the q and v projections by default, at `threshold` 0.5 with 5 heads, as the paper does.

    Args:
        num_heads: parallel sets of singular values. One head has no router and merges into the
            weight exactly; several are mixed anew for each token and cannot be merged.
        gate: "softmax" (the paper); "none", the mean of the heads, which has no router and merges
            exactly; or another that is registered in `svdtune.methods.mosara.gates`, such as the
            laboratory's "top1".
        use_v: train the diagonal v, which starts at 0 (False: ablation, Table 4; the model then
            changes at step 0).
        v_position: "after" the up-projection (length out), or in "front" of the down-projection
            (length in; ablation).
        See `svdtune.methods.config.SvdConfig` for r, threshold, rank_pattern and the rest.
    """

    method: ClassVar[str] = "mosara"
    paper_slices: ClassVar[tuple[str, ...] | None] = ("q", "v")
    paper_threshold: ClassVar[float | None] = 0.5

    num_heads: int = field(default=5, metadata={"help": "Parallel sets of singular values."})
    gate: str = field(
        default="softmax", metadata={"help": "How heads are mixed: softmax, none, or the laboratory's top1."}
    )
    use_v: bool = field(default=True, metadata={"help": "Train the diagonal v."})
    v_position: str = field(default="after", metadata={"help": "Where v stands: after or front."})

    def _problems(self) -> Iterator[str]:
        yield from super()._problems()
        if self.target_parameters:
            yield (
                "`target_parameters` changes weights before any token comes, and Mo-SARA's gate looks at tokens; use SARA or "
                "SORSA for experts, or name layers in `target_modules`"
            )
        if self.gate not in GATES:
            yield f"`gate` must be one of {GATES.listed()}; got {self.gate!r}"
        yield from one_of("v_position", self.v_position, ("after", "front"))
        if isinstance(self.num_heads, bool) or not isinstance(self.num_heads, int) or self.num_heads < 1:
            yield f"`num_heads` must be a whole number of at least 1; got {self.num_heads!r}"

    @property
    def has_router(self) -> bool:
        """Whether the heads are mixed anew for each token, so that the adapter is no matrix."""
        return has_router(self.num_heads, self.gate)
