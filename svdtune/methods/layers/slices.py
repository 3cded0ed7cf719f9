"""FusedLinear: a fused projection with an adapted layer of its own for each slice.

Each slice is an ordinary adapted layer, named `<module>.<slice>`. Its base layer is a `RowSlice`: a
view of some rows of the fused weight, whose output is 0. So the layer's output is what it adds.
Each slice has its own rank, factors, saved tensors and fingerprint, and needs no special case.
"""

from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from svdtune import spectra
from svdtune.errors import SvdtuneError
from svdtune.methods.compute.lowrank import compute_dtype
from svdtune.methods.layers.base import SvdLayer
from svdtune.methods.layers.quantization import device_and_dtype, is_quantized
from svdtune.methods.layers.rows import Rows
from svdtune.methods.layers.samples import Samples


class RowSlice(nn.Module):
    """Rows of another layer's weight, in the place of a base layer. It owns no parameter.

    Attributes:
        whole: the layer that owns the weight.
        rows: which of its rows.
        in_features, out_features: of the slice's matrix [out, in].
    """

    def __init__(self, whole: nn.Module, rows: Rows):
        super().__init__()
        # in a tuple: a submodule would put the weight into the state dict a second time
        self._whole = (whole,)
        self.rows = rows
        self.out_features, self.in_features = rows.count, spectra.matrix_shape(whole)[1]

    @property
    def whole(self) -> nn.Module:
        return self._whole[0]

    @property
    def weight(self) -> Tensor:
        """The slice's matrix [out, in] in the stored dtype, or dequantized. It is on the meta
        device if the fused weight is."""
        device, dtype = device_and_dtype(self.whole)
        if device.type == "meta" and not hasattr(self.whole, "_hf_hook"):
            return torch.empty(self.out_features, self.in_features, device=device, dtype=dtype)
        return self.rows.matrix(spectra.base_weight(self.whole))

    @property
    def bias(self) -> Tensor | None:
        """The fused layer's whole bias: a slice has none of its own to train."""
        bias = self.whole.bias
        assert bias is None or isinstance(bias, Tensor)
        return bias

    @torch.no_grad()
    def write(self, matrix: Tensor) -> None:
        """Put a matrix [out, in] into the slice's rows.

        Raises:
            SvdtuneError: the weight is quantized, so that rows next to the slice would be rounded
                once more, or offloaded.
        """
        if is_quantized(self.whole):
            raise SvdtuneError(
                "a slice of a fused quantized weight cannot be merged: quantizing the weight again would change other rows. "
                "Load the base model without quantization and merge there"
            )
        if getattr(getattr(self.whole, "_hf_hook", None), "offload", False):
            raise SvdtuneError(
                "a slice of an offloaded weight cannot be merged in memory. Merge on disk with `svdtune merge`, or load the "
                "model without offloading"
            )
        self.rows.of(spectra.base_weight(self.whole), 0).copy_(self.rows.apart(matrix, 0))

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(*x.shape[:-1], self.out_features, dtype=compute_dtype(x))

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, rows={self.rows.as_list()}"


class Fused(nn.Module, BaseTunerLayer):
    """A module whose weights are adapted in slices. Each slice is an adapted layer below it. PEFT
    takes the module for an adapted layer too."""

    adapter_layer_names = ()
    other_param_names = ()

    def __init__(self, base_layer: nn.Module):
        super().__init__()
        self.base_layer = base_layer

    def slices(self) -> Iterator[SvdLayer[Any]]:
        """The adapted slices."""
        return (module for module in self.children() if isinstance(module, SvdLayer))

    @property
    def active_adapter(self) -> str | list[str]:
        return next(self.slices()).active_adapter

    @property
    def merged_adapters(self) -> list[str]:  # type: ignore[override]  # the slices' own, which nobody sets here
        return next(self.slices()).merged_adapters

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Nothing: PEFT merges every tuner layer, and the slices are such."""

    def unmerge(self) -> None:
        """Nothing, as `merge`."""

    def delete_adapter(self, adapter_name: str) -> None:
        """Nothing, as `merge`."""

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The base module alone: with adapters merged into it, or as it was before any."""
        for part in self.slices():
            part.unload_and_optionally_merge_module(merge, safe_merge, adapter_names)
        return self.get_base_layer()

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return False

    def __repr__(self) -> str:
        return f"svdtune.{super().__repr__()}"


class FusedLinear(Fused):
    """A fused projection; its adapted slices are submodules by the slices' names."""

    def __init__(self, base_layer: nn.Module):
        super().__init__(base_layer)
        self.out_features, self.in_features = spectra.matrix_shape(base_layer)

    def slice(self, part: str) -> SvdLayer[Any] | None:
        """The adapted slice of a name, None where it is not adapted."""
        return cast(SvdLayer[Any] | None, self._modules.get(part))  # no other modules have such names

    def forward(self, x: Tensor, *args: Any, adapter_names: Samples | None = None, **kwargs: Any) -> Tensor:
        """The fused layer's output with every slice's addition in its rows."""
        # The slices come first: one that was merged and is disabled now unmerges itself.
        heard = [part for part in self.slices() if adapter_names is not None or not part.is_silent()]
        added = [(_rows(part), part(x, adapter_names=adapter_names)) for part in heard]
        y = self.base_layer(x, *args, **kwargs)
        if added and type(self.base_layer) not in (nn.Linear, Conv1D):
            # what other layers give may be a view, or be kept for their own backward pass
            y = y.clone()
        for rows, addition in added:
            rows.of(y, -1).add_(rows.apart(addition, -1))
        return y


def _rows(part: SvdLayer[Any]) -> Rows:
    base = part.get_base_layer()
    assert isinstance(base, RowSlice)
    return base.rows


def whole_pairs(
    slices: Mapping[str, list[int]], pairs: Mapping[str, tuple[Tensor, Tensor]]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Pairs by module of the base model. The slices of one weight are put together without loss.

    Slices stand side by side: A = [A_q, A_v] [in, w_q + w_v]. B [out, w_q + w_v] has each slice's B
    in its rows and columns, and zeros elsewhere. So B Aᵀ holds each slice's change in its rows.

    Args:
        slices: a configuration's `slices`.
        pairs: A [in, w] and B [out, w] of each adapted layer.
    """
    whole: dict[str, tuple[Tensor, Tensor]] = {}
    for layer, (A, B) in pairs.items():
        if layer not in slices:
            whole[layer] = A, B
            continue
        module, rows = layer.rpartition(".")[0], Rows(*slices[layer])
        spread = B.new_zeros(rows.groups * rows.width, B.shape[1])
        rows.of(spread, 0).copy_(rows.apart(B, 0))
        before = whole.get(module)
        whole[module] = (
            (A, spread) if before is None else (torch.cat([before[0], A], 1), torch.cat([before[1], spread], 1))
        )
    return whole
