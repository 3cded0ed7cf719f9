"""The matrix [out, in] behind a layer, whichever kind of layer stores it.

Linear stores it as it is, transformers' Conv1D transposed, and a convolution as its kernel [out, in / groups, k, ...], which
is the matrix [out, in / groups · k ...] that multiplies each patch of the input.
"""

from contextlib import nullcontext
from math import prod

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
    return module.out_features, module.in_features


def as_stored(module: nn.Module, matrix: Tensor) -> Tensor:
    """A matrix [out, in] in the shape in which a layer of this kind stores it."""
    if isinstance(module, CONVOLUTIONS):
        return matrix.reshape(module.weight.shape)
    return matrix.mT if isinstance(module, Conv1D) else matrix


def base_weight(module: nn.Module) -> Tensor:
    """The weight of a layer as a matrix [out, in], in its stored dtype, or dequantized.

    Linear as it is, transformers' Conv1D transposed, kernels flattened to [out, in / groups · kh · kw], 8-bit and 4-bit
    layers dequantized by PEFT. Weights that Accelerate offloaded are read from where they wait; ZeRO-3 and tensor-parallel
    shards are gathered.

    Raises:
        SvdtuneError: the layer has no such weight, or its values are not in memory.
    """
    if isinstance(module, BaseTunerLayer):
        module = module.get_base_layer()
    if getattr(module, "weight", None) is None and not hasattr(module, "W_q"):
        raise SvdtuneError(f"{type(module).__name__} has no weight to decompose; leave it out of target_modules")
    with _in_memory(module), gather_params_ctx(module.weight), torch.no_grad():
        weight = dequantize_module_weight(module).detach()
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


def _in_memory(module: nn.Module):
    """A context in which Accelerate's offloaded parameters of `module` hold their values."""
    if not hasattr(module, "_hf_hook"):
        return nullcontext()
    from accelerate.utils import align_module_device

    return align_module_device(module)
