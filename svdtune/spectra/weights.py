"""The matrix [out, in] behind a layer, whichever kind of layer stores it.

Linear stores it as it is, transformers' Conv1D transposed, and a convolution as its kernel [out, in
/ groups, k, ...], which is the matrix [out, in / groups · k ...] that multiplies each patch of the
input.
"""

import copy
from contextlib import AbstractContextManager, nullcontext
from math import prod
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import dequantize_module_weight, gather_params_ctx
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from svdtune.errors import SvdtuneError

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def matrix_shape(module: nn.Module) -> tuple[int, int]:
    """(out, in) of a layer's matrix, without reading it."""
    if isinstance(module, BaseTunerLayer):
        module = module.get_base_layer()
    if isinstance(module, CONVOLUTIONS):
        return module.out_channels, module.in_channels // module.groups * prod(module.kernel_size)
    if isinstance(module, Conv1D):
        rows, columns = module.weight.shape
        return columns, rows
    linear: Any = module  # nn.Linear, a quantized one or a slice, which have no class in common
    return linear.out_features, linear.in_features


def as_stored(module: nn.Module, matrix: Tensor) -> Tensor:
    """A matrix [out, in] in the shape in which a layer of this kind stores it."""
    if isinstance(module, CONVOLUTIONS):
        return matrix.reshape(module.weight.shape)
    return matrix.mT if isinstance(module, Conv1D) else matrix


def base_weight(module: nn.Module) -> Tensor:
    """The weight of a layer as a matrix [out, in], in its stored dtype, or dequantized.

    Linear as it is, transformers' Conv1D transposed, kernels flattened to [out, in / groups · kh ·
    kw], 8-bit and 4-bit layers dequantized by PEFT. Weights that Accelerate offloaded are read from
    where they wait; ZeRO-3 and tensor-parallel shards are gathered.

    Raises:
        SvdtuneError: the layer has no such weight, or its values are not in memory.
    """
    if isinstance(module, BaseTunerLayer):
        module = module.get_base_layer()
    stored: Any = module.W_q if hasattr(module, "W_q") else getattr(module, "weight", None)
    if stored is None:
        raise SvdtuneError(f"{type(module).__name__} has no weight to decompose; leave it out of target_modules")
    with _in_memory(module), gather_params_ctx(stored), torch.no_grad():
        weight = _dequantized(module).detach()
        if hasattr(weight, "full_tensor"):
            weight = weight.full_tensor()
        if weight.is_meta:
            raise SvdtuneError(
                f"the weight of {type(module).__name__} is on the meta device and has no values; "
                "load the model's weights before adding an adapter that decomposes them"
            )
        if isinstance(module, Conv1D):
            weight = weight.T
        return weight.flatten(1)


def _dequantized(module: nn.Module) -> Tensor:
    stored: Any = getattr(module, "weight", None)
    if type(stored).__name__ == "Int8Params":
        # The scales are with the weight until the first use, then with the layer. PEFT's function
        # would take those of a weight before the last merge, and on CPUs lose them.
        layer: Any = module  # bitsandbytes'
        scales = layer.state.SCB if stored.SCB is None else stored.SCB
        return stored.data * (scales.to(stored.device)[:, None] / 127)
    state = getattr(stored, "quant_state", None)
    if getattr(state, "packing_format_for_cpu", False):
        # After inference on some CPUs, bitsandbytes keeps 4-bit codes in another order, which
        # dequantizing does not know.
        from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse, dequantize_4bit

        return dequantize_4bit(*_convert_weight_packed_for_cpu_inverse(stored.data, copy.deepcopy(state)))
    return dequantize_module_weight(module)


def _in_memory(module: nn.Module) -> AbstractContextManager[None]:
    """A context in which Accelerate's offloaded parameters of `module` hold their values."""
    if not hasattr(module, "_hf_hook"):
        return nullcontext()
    from accelerate.utils import align_module_device

    return align_module_device(module)
