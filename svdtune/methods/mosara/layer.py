"""MoSaraLinear: Mo-SARA's layer."""

from collections.abc import Mapping

import torch
from torch import Tensor

from svdtune.errors import SvdtuneError
from svdtune.linalg import Factors
from svdtune.methods.layer import SvdLayer
from svdtune.methods.mosara.config import MoSaraConfig
from svdtune.methods.mosara.math import add_mosara, mosara_delta, mosara_linear, random_start, scaled_rows


class MoSaraLinear(SvdLayer):
    """A linear layer with Mo-SARA adapters.

    Trained: mosara_lambda [m, k], mosara_v [out] (or [in] in front), mosara_w1 [k], mosara_w2 [m].
    Frozen: frozen_U [out, k], frozen_V [in, k], the weight's leading singular vectors in fp32.
    """

    method = "mosara"
    trained = ("mosara_lambda", "mosara_v", "mosara_w1", "mosara_w2")
    frozen = ("frozen_U", "frozen_V")

    def new_tensors(self, r: int, config: MoSaraConfig, factors: Factors | None) -> dict[str, Tensor | None]:
        lam, w1, w2 = random_start(r, config.num_heads)
        length = self.in_features if config.v_position == "front" else self.out_features
        v = torch.zeros(length) if config.init_weights else torch.rand(length)
        if factors is not None:
            U, V = factors.U, factors.Vh.mT.contiguous()
        else:
            U, V = (torch.randn(n, r) / n**0.5 for n in (self.out_features, self.in_features))
        return {
            "mosara_lambda": lam,
            "mosara_v": v if config.use_v else None,
            "mosara_w1": w1,
            "mosara_w2": w2,
            "frozen_U": U,
            "frozen_V": V,
        }

    def _tensors(self, adapter: str) -> tuple:
        names = ("frozen_U", "frozen_V", "mosara_lambda", "mosara_v", "mosara_w1", "mosara_w2")
        return (*(self.adapter_tensor(name, adapter) for name in names), self._front(adapter))

    def _front(self, adapter: str) -> bool:
        return self.configs[adapter].v_position == "front"

    def fused(self, x: Tensor, weight: Tensor, bias: Tensor | None, x_adapter: Tensor | None, adapter: str) -> Tensor:
        return mosara_linear(x, weight, bias, *self._tensors(adapter), x_adapter)

    def add_to(self, y: Tensor, x: Tensor, adapter: str) -> Tensor:
        return add_mosara(y, x, *self._tensors(adapter))

    @staticmethod
    def low_rank_pair(tensors: Mapping[str, Tensor], config: MoSaraConfig) -> tuple[Tensor, Tensor]:
        check_one_head(config.num_heads)
        U, V, lam, v = (tensors.get(name) for name in ("frozen_U", "frozen_V", "mosara_lambda", "mosara_v"))
        if config.v_position == "front":
            return scaled_rows(V, v), U * lam
        return V, scaled_rows(U, v) * lam

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The one head's ΔW.

        Raises:
            SvdtuneError: several heads.
        """
        check_one_head(self.mosara_lambda[adapter].shape[0], adapter)
        U, V, lam, v, _, _, front = self._tensors(adapter)
        return mosara_delta(U, V, lam, v, front).detach()

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return self.configs[adapter_name].num_heads == 1


def check_one_head(num_heads: int, adapter: str = "") -> None:
    """Raise `SvdtuneError` for an adapter with more than one head: it is no matrix."""
    if num_heads > 1:
        raise SvdtuneError(
            f"the adapter{f' {adapter!r}' if adapter else ''} is Mo-SARA with {num_heads} heads, which cannot be merged or exported: its router mixes "
            "the heads anew for every token, so no single weight equals it. Keep it as an adapter (PeftModel), or train "
            "with num_heads=1, which merges exactly"
        )
