"""SorsaLinear: SORSA's layer."""

from collections.abc import Collection

import torch
from torch import Tensor, nn

from svdtune.linalg import Factors
from svdtune.methods.compute.lowrank import Product, low_rank_linear
from svdtune.methods.layers.convolution import add_convolved
from svdtune.methods.layers.lowrank import LowRankLayer, Tensors
from svdtune.methods.sara.math import kaiming_factors
from svdtune.methods.sorsa.config import SorsaConfig
from svdtune.methods.sorsa.math import principal_part, sorsa_change


class SorsaLinear(LowRankLayer[SorsaConfig]):
    """A layer with SORSA adapters.

    Trained: sorsa_U [out, r], sorsa_s [r], sorsa_V [in, r], fp32, from r singular triplets of the
    weight, the leading ones unless `components` says otherwise. Frozen: frozen_P0 = U₀ diag(s₀)
    [out, r] and frozen_V0 [in, r], those triplets at the start.

    In the split layout the base weight was stored without P₀ V₀ᵀ. There the adapter adds W_p alone,
    and while it does not act the layer adds P₀ V₀ᵀ, so that disabling it gives the model from
    before training.
    """

    method = "sorsa"
    trained = ("sorsa_U", "sorsa_s", "sorsa_V")
    frozen = ("frozen_P0", "frozen_V0")
    regularized: bool = False  # whether the regularizer ever acted on it
    sorsa_s: nn.ParameterDict
    frozen_P0: nn.ParameterDict
    frozen_V0: nn.ParameterDict

    def new_tensors(self, r: int, config: SorsaConfig, factors: Factors | None) -> dict[str, Tensor | None]:
        if factors is not None:
            U, s, V = factors.U, factors.s, factors.Vh.mT.contiguous()
            frozen = self.frozen_from(factors)
        else:
            U, s, V = kaiming_factors(self.out_features, self.in_features, r)
            frozen = {"frozen_P0": torch.zeros_like(U), "frozen_V0": torch.zeros_like(V)}
        return {"sorsa_U": U, "sorsa_s": s, "sorsa_V": V, **frozen}

    def lacks_regularizer(self) -> bool:
        trained = {name.rpartition(".")[2] for name, _ in self.trained_parameters()}
        return not self.regularized and any(self.configs[adapter].gamma > 0 for adapter in trained)

    @staticmethod
    def frozen_from(factors: Factors) -> dict[str, Tensor]:
        return dict(zip(SorsaLinear.frozen, principal_part(factors), strict=True))

    @staticmethod
    def change(tensors: Tensors, config: SorsaConfig) -> Product:
        U, s, V = map(tensors, SorsaLinear.trained)
        assert U is not None
        assert s is not None
        assert V is not None
        return sorsa_change(U, s, V, *(() if config.layout == "split" else map(tensors, SorsaLinear.frozen)))

    # The split layout's base weight

    @property
    def stored_apart(self) -> str | None:
        """The adapter whose principal part is missing from the stored base weight; None if the
        weight is whole."""
        for name, config in self.configs.items():
            if config.layout == "split" and not self.awaits(name):
                return name
        return None

    def is_silent(self) -> bool:
        return super().is_silent() and self.stored_apart is None

    def made_whole(self, y: Tensor, x: Tensor, present: Collection[str]) -> Tensor:
        adapter = self.stored_apart
        if adapter is None or adapter in present:
            return y
        P0, V0 = self.frozen_P0[adapter], self.frozen_V0[adapter]
        if self._is_convolution:
            return add_convolved(self.convolution(), y, x, V0, P0)
        return low_rank_linear(x, None, y.contiguous(), Product(P0, None, V0))
