"""Base layers whose weight is quantized: found by what they are, merged by PEFT's backend for them,
put back exactly."""

from typing import Any

import torch
from peft.utils.quantization_utils import (
    ForwardOnlyQuantizationBackend,
    QuantizationBackend,
    get_quantization_kwargs,
    resolve_quantization_backend,
)
from torch import nn

from svdtune.errors import SvdtuneError


def is_quantized(base: nn.Module) -> bool:
    """Whether a base layer stores codes instead of its matrix's numbers. Some codes have a floating
    dtype all the same."""
    weight = getattr(base, "weight", None)
    if weight is None or not weight.is_floating_point():
        return True
    return type(weight).__module__.startswith("torchao.") or type(weight).__name__ in ("Params4bit", "Int8Params")


def backend_of(base: nn.Module, model: nn.Module) -> QuantizationBackend | None:
    """PEFT's way to read and write a quantized weight; None if the layer is not quantized.

    Args:
        base: the layer.
        model: that it belongs to; torchao's way to quantize again is found in its configuration.
    """
    if not is_quantized(base):
        return None
    try:
        backend = resolve_quantization_backend(base, **get_quantization_kwargs(model))
    except ValueError:  # torchao without a configuration that says how to quantize again
        backend = None
    return backend or ForwardOnlyQuantizationBackend(type(base).__name__)


def check_mergeable(backend: QuantizationBackend | None) -> None:
    """Raise `SvdtuneError` for a quantized layer into which nothing can be merged."""
    if backend is not None and not backend.supports_merge:
        raise SvdtuneError(
            f"the weight is quantized ({backend.backend_name}) in a way that cannot be written again, so no adapter can be "
            "merged into it. Load the base model without quantization and merge there"
        )


def kept(base: Any) -> Any:
    """What a quantized layer stores, to be put back as it is."""
    if hasattr(base, "W_q"):
        return base
    # PEFT changes bitsandbytes' notes beside the codes when it merges
    notes = dict(vars(base.weight))
    # the scales move from the weight to the layer at the first use
    if type(base.weight).__name__ == "Int8Params":
        scales = base.state.SCB if base.weight.SCB is None else base.weight.SCB
        notes |= {"CB": base.weight.data, "SCB": scales}
    return base.weight, notes


def put_back(layer: Any, stored: Any) -> None:
    """Give an adapted layer's base what `kept` returned: the same codes and scales."""
    if isinstance(stored, nn.Module):  # HQQ: PEFT replaces the whole layer when it merges
        layer.base_layer = stored
        return
    base = layer.get_base_layer()
    base.weight, notes = stored
    vars(base.weight).clear()
    vars(base.weight).update(notes)
    # bitsandbytes int8 keeps what it derived from the weight
    if getattr(base, "state", None) is not None:
        base.state.reset_grads()


def device_and_dtype(base: nn.Module) -> tuple[torch.device, torch.dtype]:
    """The device and the dtype of a base layer's weight. HQQ has no such weight; its layers name
    the dtype they compute in."""
    layer: Any = getattr(base, "whole", base)  # of a slice
    if hasattr(layer, "W_q"):
        return layer.W_q.device, layer.compute_dtype
    return layer.weight.device, layer.weight.dtype
