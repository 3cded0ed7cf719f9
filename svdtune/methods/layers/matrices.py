"""The adapted layers of a model as matrices: the weight each has now, the one it started from, and
what it trains.

One view for SARA, Mo-SARA, SORSA, LoRA, PiSSA, every other PEFT method that merges, and full
fine-tuning.
"""

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from svdtune import spectra
from svdtune.errors import SvdtuneError
from svdtune.linalg import orthonormality_error
from svdtune.methods.compute.lowrank import pair
from svdtune.methods.layers.base import SvdLayer
from svdtune.methods.layers.slices import Fused
from svdtune.methods.mosara.layer import MoSaraLinear
from svdtune.methods.sorsa.layer import SorsaLinear
from svdtune.methods.sorsa.math import sorsa_change

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Observed:
    """One layer.

    Attributes:
        name: of the module in the base model.
        module: the adapted layer, or the plain one under full fine-tuning.
    """

    name: str
    module: nn.Module

    @property
    def adapter(self) -> str:
        """Name of the adapter that is looked at: the one that acts on the layer."""
        return acting(self.module)[0]

    @torch.no_grad()
    def weight(self) -> Tensor:
        """The weight [out, in] that acts now, adapter included, in fp32 or better."""
        weight = _exact(spectra.base_weight(self.module))
        if isinstance(self.module, SvdLayer):
            return weight + self.module.delta(self.adapter).to(weight)
        if not isinstance(self.module, BaseTunerLayer):
            return weight
        if (pair := _lora_pair(self.module, self.adapter)) is not None:
            return weight + (pair[1] @ pair[0].mT).to(weight)
        merged = copy.deepcopy(self.module)
        merged.merge(adapter_names=[self.adapter])
        return _exact(spectra.base_weight(merged))

    @torch.no_grad()
    def start(self) -> Tensor:
        """The base model's own weight [out, in], in fp32 or better; ask before the first step.

        PiSSA and its kin change the base weight when they are put on; before the first step weight
        and adapter together still make up the base model's. In SORSA's split layout it was stored
        without the principal part.
        """
        if not isinstance(self.module, SvdLayer):
            return self.weight()
        weight = _exact(spectra.base_weight(self.module))
        if isinstance(self.module, SorsaLinear) and (adapter := self.module.stored_apart) is not None:
            return weight + (self.module.frozen_P0[adapter] @ self.module.frozen_V0[adapter].mT).to(weight)
        return weight

    @torch.no_grad()
    def added_pair(self) -> Pair | None:
        """A [in, w] and B [out, w] whose product B Aᵀ is added, by ours to the base model's own
        weight, by LoRA to the weight in memory (which PiSSA changed); None where it is no thin
        product."""
        # in the split layout too, where W_p is added to less than that weight
        if isinstance(self.module, SorsaLinear):
            return pair(sorsa_change(*self.module.adapter_tensors(self.adapter).values()))
        if isinstance(self.module, SvdLayer):
            return self.module.pair(self.adapter)
        return _lora_pair(self.module, self.adapter) if isinstance(self.module, LoraLayer) else None

    @torch.no_grad()
    def trained_pair(self) -> Pair | None:
        """A and B of the trained product itself: W_p of SORSA and PiSSA, ΔW of LoRA and SARA; None
        under full fine-tuning."""
        if isinstance(self.module, SorsaLinear):
            tensors = self.module.adapter_tensors(self.adapter)
            return tensors["sorsa_V"], tensors["sorsa_U"] * tensors["sorsa_s"]
        return self.added_pair()

    @torch.no_grad()
    def orthonormality(self) -> dict[str, float]:
        """‖UᵀU − I‖_F and ‖VᵀV − I‖_F of factors that start orthonormal and are trained:
        SORSA's."""
        if not isinstance(self.module, SorsaLinear):
            return {}
        tensors = self.module.adapter_tensors(self.adapter)
        return {name: float(orthonormality_error(tensors[f"sorsa_{name}"])) for name in ("U", "V")}


def acting(module: nn.Module) -> list[str]:
    """The adapters of a layer that are active; of those that are active elsewhere it has none."""
    if not isinstance(module, BaseTunerLayer):
        return []
    own = module._get_available_adapters()  # none, where a method keeps its tensors otherwise
    return [name for name in module.active_adapters if not own or name in own]


def observed_layers(model: nn.Module, wanted: Callable[[str], bool] = lambda name: True) -> list[Observed]:
    """The `trained_layers` whose change is a matrix: not Mo-SARA with several heads, whose change
    depends on the token.
    """
    return [layer for layer in trained_layers(model) if _is_matrix(layer.module) and wanted(layer.name)]


def trained_layers(model: nn.Module) -> list[Observed]:
    """The layers of a model that are trained, in its order.

    Under adapters those that carry one that is active, without embeddings; without adapters the
    linear layers but the output head, of them those that are not frozen where a part is.

    Raises:
        SvdtuneError: several adapters act on one layer, whose changes are one sum.
    """
    adapted = any(isinstance(module, BaseTunerLayer) for module in model.modules())
    get_head: Any = getattr(model, "get_output_embeddings", None)
    head = None if adapted or get_head is None else get_head()
    found = [
        Observed(re.sub(r"^base_model\.model\.", "", name), module)
        for name, module in model.named_modules()
        if (_carries(module) if adapted else _is_linear(module) and module is not head)
    ]
    for layer in found:
        if len(names := acting(layer.module)) > 1:
            raise SvdtuneError(
                f"{len(names)} adapters act on {layer.name}: {', '.join(names)}. An analysis is of one of them: choose it with "
                f"model.set_adapter({names[0]!r})"
            )
    unfrozen = [layer for layer in found if any(tensor.requires_grad for tensor in layer.module.parameters())]
    return found if adapted else unfrozen or found


def _carries(module: nn.Module) -> bool:
    if not isinstance(module, BaseTunerLayer) or isinstance(module, Fused) or not acting(module):
        return False
    return isinstance(module, SvdLayer) or (hasattr(module, "merge") and _is_linear(module.get_base_layer()))


def _is_matrix(module: nn.Module) -> bool:
    return not isinstance(module, MoSaraLinear) or not module.configs[acting(module)[0]].has_router


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, Conv1D, *spectra.CONVOLUTIONS))


def _exact(weight: Tensor) -> Tensor:
    return weight.to(torch.promote_types(weight.dtype, torch.float32))


def _lora_pair(layer: nn.Module, adapter: str) -> Pair | None:
    """A [in, r] and scaling · B [out, r] of a plain LoRA on a linear layer; None for variants such
    as DoRA or AdaLoRA."""
    if not isinstance(layer, LoraLayer) or adapter not in layer.lora_A:
        return None
    if getattr(layer, "lora_variant", {}).get(adapter):
        return None
    first, second = layer.lora_A[adapter], layer.lora_B[adapter]
    if not isinstance(first, nn.Linear) or not isinstance(second, nn.Linear) or second.bias is not None:
        return None
    return first.weight.detach().mT, second.weight.detach() * layer.scaling[adapter]
