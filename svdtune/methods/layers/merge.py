"""Merging: how an adapted layer puts adapters into its base weight and takes them out again, for
every kind of weight."""

from abc import abstractmethod
from collections.abc import Collection, Iterator
from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from svdtune import spectra
from svdtune.errors import SvdtuneError
from svdtune.methods.layers.frozen import FrozenTensors
from svdtune.methods.layers.quantization import check_mergeable, device_and_dtype, kept, put_back


class Merging(nn.Module, BaseTunerLayer):
    """The part of an adapted layer that merges.

    Attributes:
        r: rank by adapter name.
        merged_adapters: names of the adapters that the base weight holds now.
        tied: whether other modules have the same weight, as an output head has the embeddings';
            merging then unties.
    """

    frozen: ClassVar[tuple[str, ...]]
    r: dict[str, int]

    @abstractmethod
    def delta(self, adapter: str) -> Tensor:
        """What an adapter adds to the base weight [out, in]."""

    @abstractmethod
    def _check_loaded(self, active: Collection[str]) -> None:
        """Raise `SvdtuneError` for an adapter whose values have not come yet."""

    def _start_merging(self) -> None:
        self.merged_adapters: list[str] = []
        self.tied = False
        self._before_merge: Any = None

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add adapters to the base weight, in fp32, rounded once. The weight before is kept for an
        exact `unmerge`.

        Raises:
            SvdtuneError: an adapter that cannot be merged, or with `safe_merge` a result that is
                not finite.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.r]
        if names:
            self._check_loaded(names)
            check_mergeable(self.quantization_backend)
            self._add_to_weight(names, safe_merge)
        for tensors in self._frozen_tensors():
            tensors.hide()

    def _add_to_weight(self, names: list[str], safe_merge: bool) -> None:
        deltas = [self.delta(name) for name in names]
        before = spectra.as_stored(self.get_base_layer(), spectra.base_weight(self))
        merged = before.to(torch.promote_types(before.dtype, torch.float32), copy=True)
        for delta in deltas:
            merged += spectra.as_stored(self.get_base_layer(), delta).to(merged)
        merged = merged.to(before.dtype)
        if safe_merge and not torch.isfinite(merged).all():
            raise SvdtuneError(
                f"NaNs detected in the merged weights. The adapter {', '.join(names)} seems to be broken: its factors hold "
                "NaN or infinity, or the merged weight overflows its dtype"
            )
        if self._before_merge is None:
            self._before_merge = self._kept(before)
        if self.tied:  # the other modules with this weight keep it
            self.get_base_layer().weight = nn.Parameter(merged, requires_grad=False)
        else:
            self.set_base_weight(merged)
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Put the weight from before merging back, bit for bit."""
        if self._before_merge is not None:
            if self.tied:
                self.get_base_layer().weight = self._before_merge
            elif self.quantization_backend is None:
                self.set_base_weight(self._before_merge.to(device_and_dtype(self.get_base_layer())[0]))
            else:
                put_back(self, self._before_merge)
            self._before_merge = None
        self.merged_adapters.clear()
        for tensors in self._frozen_tensors():
            tensors.show()

    def _frozen_tensors(self) -> Iterator[FrozenTensors]:
        return (getattr(self, name) for name in self.frozen)

    def _kept(self, weight: Tensor) -> Any:
        if self.tied:
            return self.get_base_layer().weight
        if self.quantization_backend is not None:
            return kept(self.get_base_layer())
        return weight.to("cpu", copy=True) if weight.is_cuda else weight.clone()

    def set_base_weight(self, weight_data: Tensor) -> None:
        """As PEFT's; a slice of a fused weight writes into its own rows."""
        base: Any = self.get_base_layer()
        if hasattr(base, "write"):
            base.write(weight_data)
        else:
            super().set_base_weight(weight_data)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The base layer alone, with adapters merged into it or as it was before any."""
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        else:
            self.unmerge()
        return self.get_base_layer()
