"""LowRankLayer: what SARA's and SORSA's layers share, a trained product U diag(s) Vᵀ added to the
weight."""

from abc import abstractmethod
from collections.abc import Callable, Mapping

from torch import Tensor

from svdtune.methods.compute.lowrank import Part, Product, low_rank_linear, pair
from svdtune.methods.compute.transforms import under_transform
from svdtune.methods.layers.base import Config, SvdLayer

Tensors = Callable[[str], Tensor | None]
"""An adapter's tensors by their names in `trained` and `frozen`, None for one that it lacks."""


class LowRankLayer(SvdLayer[Config]):
    """A layer whose adapters are low-rank additions; `svdtune.methods.compute.together` computes
    several in one node."""

    draws_masks = True

    @staticmethod
    @abstractmethod
    def change(tensors: Tensors, config: Config) -> Product:
        """The method's equation: what an adapter adds to the base weight."""

    def product(self, adapter: str) -> Product:
        """`change` of an adapter as it is now."""
        return self.change(lambda name: self.adapter_tensor(name, adapter), self.configs[adapter])

    def fused(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, x_adapter: Tensor | None, p: float, adapter: str
    ) -> Tensor:
        product = self.product(adapter)
        if self.together is None or under_transform():
            return low_rank_linear(x, weight, bias, product, x_adapter, p)
        return self.together.linear(self, adapter, x, Part(weight, bias, product), x_adapter, p)

    def add_to(self, y: Tensor, x: Tensor, adapter: str) -> Tensor:
        return self.fused(x, None, y, None, 0.0, adapter)

    @classmethod
    def low_rank_pair(cls, tensors: Mapping[str, Tensor], config: Config) -> tuple[Tensor, Tensor]:
        return pair(cls.change(tensors.get, config))
