"""LowRankLayer: what SARA's and SORSA's layers share, a trained product U diag(s) Vᵀ added to the weight."""

from abc import abstractmethod

from torch import Tensor

from svdtune.methods.compute.lowrank import LowRankLinear, Part, add_low_rank
from svdtune.methods.layers.base import SvdLayer


class LowRankLayer(SvdLayer):
    """A layer whose adapters are low-rank additions; `svdtune.methods.compute.together` computes several in one node."""

    draws_masks = True

    @abstractmethod
    def product(self, adapter: str) -> tuple[Tensor | None, ...]:
        """U [out, r], s [r] or None, V [in, r], and P₀ and V₀ of what is taken away, None where nothing is."""

    def fused(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, x_adapter: Tensor | None, p: float, adapter: str
    ) -> Tensor:
        part = Part(weight, bias, *self.product(adapter))
        if self.together is None:
            return LowRankLinear.apply(x, x_adapter, p, *part)
        return self.together.linear(self, adapter, x, part, x_adapter, p)

    def add_to(self, y: Tensor, x: Tensor, adapter: str) -> Tensor:
        return add_low_rank(y, x, *self.product(adapter))
