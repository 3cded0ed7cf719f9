"""SorsaLinear: SORSA's layer, in both layouts."""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from svdtune import spectra
from svdtune.linalg import Factors
from svdtune.methods.compute.lowrank import add_low_rank, scaled
from svdtune.methods.layers.convolution import add_convolved
from svdtune.methods.layers.lowrank import LowRankLayer
from svdtune.methods.sara.math import kaiming_factors
from svdtune.methods.sorsa.config import SorsaConfig
from svdtune.methods.sorsa.math import sorsa_pair


class SorsaLinear(LowRankLayer):
    """A layer with SORSA adapters.

    Trained: sorsa_U [out, r], sorsa_s [r], sorsa_V [in, r], fp32, from the weight's r leading singular triplets.
    Frozen: frozen_P0 = U₀ diag(s₀) [out, r] and frozen_V0 [in, r], the principal part at the start.

    In the residual layout the base weight has lost P₀ V₀ᵀ for as long as the adapter exists, active or not, so whatever
    wants the base model's function adds it back: on the fly while the adapter is inactive or disabled, to the weight
    itself when the adapter is deleted or unloaded. In the split layout it was stored without P₀ V₀ᵀ and never holds it.
    """

    method = "sorsa"
    trained = ("sorsa_U", "sorsa_s", "sorsa_V")
    frozen = ("frozen_P0", "frozen_V0")

    def __init__(self, base_layer: nn.Module):
        super().__init__(base_layer)
        self._subtracted: set[str] = set()

    def new_tensors(self, r: int, config: SorsaConfig, factors: Factors | None) -> dict[str, Tensor | None]:
        if factors is not None:
            U, s, V = factors.U, factors.s, factors.Vh.mT.contiguous()
            frozen = self.frozen_from(factors)
        else:
            U, s, V = kaiming_factors(self.out_features, self.in_features, r)
            frozen = {"frozen_P0": torch.zeros_like(U), "frozen_V0": torch.zeros_like(V)}
        return {"sorsa_U": U, "sorsa_s": s, "sorsa_V": V, **frozen}

    @staticmethod
    def frozen_from(factors: Factors) -> dict[str, Tensor]:
        return {
            "frozen_P0": scaled(factors.U, factors.s),
            "frozen_V0": factors.Vh.mT.clone(memory_format=torch.contiguous_format),
        }

    def update_layer(
        self, adapter_name: str, r: int, config: SorsaConfig, factors: Factors | None = None, load_only: bool = False
    ) -> None:
        super().update_layer(adapter_name, r, config, factors, load_only)
        if factors is not None:
            self._subtract(adapter_name)

    # The residual layout's weight

    def _change_base(self, adapter: str, sign: int) -> None:
        """W ← W ± P₀ V₀ᵀ, formed in fp32 (fp64 for an fp64 weight) and rounded once to the stored dtype."""
        weight = self.get_base_weight()
        exact = torch.promote_types(weight.dtype, torch.float32)
        principal = self.frozen_P0[adapter].to(exact) @ self.frozen_V0[adapter].to(exact).mT
        changed = weight.to(exact) + sign * spectra.as_stored(self.get_base_layer(), principal).to(weight.device)
        self.set_base_weight(changed.to(weight.dtype))

    def _subtract(self, adapter: str) -> None:
        layout = self.configs[adapter].layout
        if layout == "delta" or adapter in self._subtracted:
            return
        if layout == "residual":
            self._change_base(adapter, -1)
        self._subtracted.add(adapter)

    def _restore(self, adapter: str) -> None:
        if adapter in self._subtracted and self.configs[adapter].layout == "residual":
            self._change_base(adapter, +1)
        self._subtracted.discard(adapter)

    def full_weight(self) -> Tensor:
        """The base model's own weight [out, in] in fp32 or better, whatever the layouts of the adapters on it."""
        weight = spectra.base_weight(self)
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)
        for adapter in sorted(self._subtracted):
            weight += (self.frozen_P0[adapter] @ self.frozen_V0[adapter].mT).to(weight)
        return weight

    def filled_elsewhere(self, adapter: str) -> None:
        super().filled_elsewhere(adapter)
        if self.configs[adapter].layout != "delta":
            self._subtracted.add(adapter)

    def before_load(self, adapter: str, tensors: dict[str, Tensor]) -> None:
        super().before_load(adapter, tensors)
        same = all(
            name in tensors
            and torch.equal(tensors[name].to(self.adapter_tensor(name, adapter)), getattr(self, name)[adapter])
            for name in self.frozen
            if adapter in self._subtracted
        )
        if not same:  # resuming the same adapter leaves the weight as it is, bit for bit
            self._restore(adapter)

    def after_load(self, adapter: str) -> None:
        self._subtract(adapter)

    def delete_adapter(self, adapter_name: str) -> None:
        self._restore(adapter_name)
        super().delete_adapter(adapter_name)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        base = super().unload_and_optionally_merge_module(merge, safe_merge, adapter_names)
        for adapter in sorted(self._subtracted.difference(self.merged_adapters)):
            self._restore(adapter)
        return base

    # Forward

    def base_output(self, x: Tensor, present: Collection[str], *args: Any, **kwargs: Any) -> Tensor:
        return self._add_principal(self.base_layer(x, *args, **kwargs), x, self._subtracted.difference(present))

    def _add_principal(self, y: Tensor, x: Tensor, adapters: set[str]) -> Tensor:
        for adapter in sorted(adapters):
            P0, V0 = self.frozen_P0[adapter], self.frozen_V0[adapter]
            if self._is_convolution:
                y = add_convolved(self.get_base_layer(), y, x, V0, P0)
            else:
                y = add_low_rank(y.contiguous(), x, P0, None, V0)
        return y

    def product(self, adapter: str) -> tuple[Tensor | None, ...]:
        trained = (self.adapter_tensor(name, adapter) for name in self.trained)
        if adapter in self._subtracted:
            return *trained, None, None
        return *trained, *(self.adapter_tensor(name, adapter) for name in self.frozen)

    def fused(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, x_adapter: Tensor | None, p: float, adapter: str
    ) -> Tensor:
        y = super().fused(x, weight, bias, x_adapter, p, adapter)
        return self._add_principal(y, x, self._subtracted - {adapter})

    @staticmethod
    def low_rank_pair(tensors: Mapping[str, Tensor], config: SorsaConfig) -> tuple[Tensor, Tensor]:
        if config.layout == "split":
            U, s, V = (tensors[name] for name in SorsaLinear.trained)
            return V, scaled(U, s)
        return sorsa_pair(*(tensors[name] for name in (*SorsaLinear.trained, *SorsaLinear.frozen)))

    def current_pair(self, adapter: str) -> tuple[Tensor, Tensor]:
        """W_p − P₀ V₀ᵀ, or W_p alone where the base weight is the residual already."""
        if adapter not in self._subtracted:
            return super().current_pair(adapter)
        U, s, V = (self.adapter_tensor(name, adapter) for name in self.trained)
        return V, scaled(U, s)
