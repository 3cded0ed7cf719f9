"""LowRankLayer: what SARA's and SORSA's layers share, a trained product U diag(s) Vᵀ added to the
weight."""

from abc import abstractmethod
from functools import partial

from svdtune.methods.compute.lowrank import Node, Product, add_low_rank, low_rank_linear
from svdtune.methods.compute.transforms import under_transform
from svdtune.methods.layers.base import Config, SvdLayer


class LowRankLayer(SvdLayer[Config]):
    """A layer whose adapters are low-rank additions; `svdtune.methods.compute.together` computes
    several in one node."""

    draws_masks = True

    @abstractmethod
    def product(self, adapter: str) -> Product:
        """U [out, r], s [r] or None, V [in, r], and P₀ and V₀ of what is taken away, None where
        nothing is."""

    def node(self, adapter: str) -> Node:
        """What computes the adapter with the base layer: a node of its own, or one together with
        other layers."""
        if self.together is None or under_transform():
            return low_rank_linear
        return partial(self.together.linear, self, adapter)

    def adding(self, adapter: str) -> Node:
        """What adds the adapter to an output of the base layer."""
        return add_low_rank if self.together is None else partial(self.together.add, self, adapter)
