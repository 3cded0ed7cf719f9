"""SaraLinear: SARA's layer."""

from collections.abc import Mapping

import torch
from torch import Tensor

from svdtune.linalg import Factors
from svdtune.methods.compute.lowrank import Product
from svdtune.methods.layers.lowrank import LowRankLayer
from svdtune.methods.sara.config import SaraConfig
from svdtune.methods.sara.math import add_sara, kaiming_factors, sara_linear, sara_pair


class SaraLinear(LowRankLayer[SaraConfig]):
    """A layer with SARA adapters: sara_U [out, k], sara_lambda [k], sara_V [in, k], all trained."""

    method = "sara"
    trained = ("sara_U", "sara_lambda", "sara_V")
    frozen = ()

    def new_tensors(self, r: int, config: SaraConfig, factors: Factors | None) -> dict[str, Tensor | None]:
        if factors is not None:
            U, lam, V = factors.U, torch.zeros_like(factors.s), factors.Vh.mT.contiguous()
            U = U if config.use_lambda else torch.zeros_like(U)
        else:
            U, lam, V = kaiming_factors(self.out_features, self.in_features, r)
            if config.init == "zero_v" and config.init_weights:
                U = torch.zeros_like(U)
        return {"sara_U": U, "sara_lambda": lam if config.use_lambda else None, "sara_V": V}

    def starts_moved(self) -> bool:
        return any(config.init == "kaiming" for config in self.configs.values())

    def product(self, adapter: str) -> Product:
        U, lam, V = (self.adapter_tensor(name, adapter) for name in self.trained)
        assert U is not None
        assert V is not None
        return U, lam, V, None, None

    def fused(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, x_adapter: Tensor | None, p: float, adapter: str
    ) -> Tensor:
        return sara_linear(x, weight, bias, *self.product(adapter)[:3], x_adapter, p, self.node(adapter))

    def add_to(self, y: Tensor, x: Tensor, adapter: str) -> Tensor:
        return add_sara(y, x, *self.product(adapter)[:3], self.adding(adapter))

    @staticmethod
    def low_rank_pair(tensors: Mapping[str, Tensor], config: SaraConfig) -> tuple[Tensor, Tensor]:
        return sara_pair(tensors["sara_U"], tensors.get("sara_lambda"), tensors["sara_V"])
