"""SaraConfig: SARA's settings."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

from svdtune.methods.config import SvdConfig, one_of


@dataclass
class SaraConfig(SvdConfig):
    """SARA: ΔW = U diag(λ) Vᵀ beside every adapted weight, each layer's rank from its own spectrum.

    Adapts the q and v projections by default, at `threshold` 0.01, as the paper does.

    Args:
        init: "kaiming" (the paper): all factors random, so the model changes at step 0. "zero_v":
            the up-projection (the paper's V, our U) starts at 0, as LoRA's B does (ablation, Table
            4). "spectral": U and V are the weight's leading singular vectors and λ starts at 0
            (without λ, U does), so the model starts unchanged.
        use_lambda: train the diagonal λ (False: ablation, Table 4).
        See `svdtune.methods.config.SvdConfig` for r, threshold, rank_pattern and the rest.
    """

    method: ClassVar[str] = "sara"
    paper_slices: ClassVar[tuple[str, ...] | None] = ("q", "v")
    paper_threshold: ClassVar[float | None] = 0.01

    init: str = field(default="kaiming", metadata={"help": "Start of the factors: kaiming, zero_v or spectral."})
    use_lambda: bool = field(default=True, metadata={"help": "Train the diagonal λ between the factors."})

    def _problems(self) -> Iterator[str]:
        yield from super()._problems()
        yield from one_of("init", self.init, ("kaiming", "zero_v", "spectral"))

    @property
    def needs_factors(self) -> bool:
        return self.init_weights and self.init == "spectral"
