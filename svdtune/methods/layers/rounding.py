"""Unrounded: trained tensors that another library rounded get their values back.

On a quantized base TRL's trainers set the `data` of everything that is trained to bfloat16, as
QLoRA had LoRA. A step smaller than 2⁻⁸ of a number is lost there, and so is most of what SORSA and
SARA train. The orthonormality of factors falls from 1e-6 to 1e-3. A cast that the user asks for
(`model.to(dtype)`, `autocast_adapter_dtype=False`) takes other ways, and stays.
"""

import warnings
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.nn.parallel import DistributedDataParallel

from svdtune.errors import SvdtuneWarning


class Unrounded(nn.Module):
    """The part of an adapted layer that keeps the values of its trained tensors until the first
    step."""

    trained: ClassVar[tuple[str, ...]]
    # by a tensor's name and its adapter; None once they are trained
    _values: dict[tuple[str, str], Tensor] | None

    def keep_values(self) -> None:
        """Remember the current values of the trained tensors. It costs no memory as long as they
        stay where they are."""
        self._values = {
            (name, adapter): tensor.detach()
            for name in self.trained
            for adapter, tensor in getattr(self, name)._parameters.items()
            if tensor.requires_grad and not tensor.is_meta
        }

    def forget_values(self) -> None:
        """Called once the tensors are trained."""
        self._values = None

    @torch.no_grad()
    def put_values_back(self) -> None:
        """Undo the rounding of the trained tensors, and warn of it."""
        rounded = False
        for (name, adapter), values in (self._values or {}).items():
            tensor: nn.Parameter | None = getattr(self, name)._parameters.get(adapter)
            if tensor is not None and _is_rounded(tensor, values):
                tensor.data = values.to(tensor.device)
                rounded = True
        if rounded:
            warnings.warn(
                "what the adapter trains was rounded to a lower dtype after it was put on (TRL does so on quantized bases), in "
                "which its small steps are lost; it is as it was before. To train in the base's dtype, pass "
                "autocast_adapter_dtype=False to get_peft_model, or call model.to(dtype)",
                SvdtuneWarning,
                stacklevel=2,
            )

    def train(self, mode: bool = True) -> "Unrounded":
        """As PyTorch's. Trainers call it before the first pass."""
        self.put_values_back()
        if self._values is not None:
            self.keep_values()  # they may have moved
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> "Unrounded":
        self.put_values_back()
        super()._apply(*args, **kwargs)
        if self._values is not None:
            self.keep_values()
        return self


def _is_rounded(tensor: Tensor, values: Tensor) -> bool:
    """Whether a tensor equals these values cast to a lower dtype."""
    if tensor.dtype == values.dtype or tensor.shape != values.shape or not tensor.is_floating_point():
        return False
    lower = torch.finfo(tensor.dtype).eps > torch.finfo(values.dtype).eps
    return lower and torch.equal(tensor, values.to(tensor))


def _before_ddp(module: nn.Module, _: str, inside: nn.Module | None) -> None:
    """Undo the rounding before DistributedDataParallel, which sorts parameters by dtype when it is
    made."""
    if isinstance(module, DistributedDataParallel) and inside is not None:
        for layer in inside.modules():
            if isinstance(layer, Unrounded):
                layer.put_values_back()


register_module_module_registration_hook(_before_ddp)
