"""SaraLinear: SARA's layer."""

import torch
from torch import Tensor

from svdtune.linalg import Factors
from svdtune.methods.compute.lowrank import Product
from svdtune.methods.layers.lowrank import LowRankLayer, Tensors
from svdtune.methods.sara.config import SaraConfig
from svdtune.methods.sara.math import kaiming_factors, sara_change


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

    @staticmethod
    def change(tensors: Tensors, config: SaraConfig) -> Product:
        U, lam, V = map(tensors, SaraLinear.trained)
        assert U is not None
        assert V is not None
        return sara_change(U, lam, V)
