"""A convolution's pair in the form of PEFT's LoRA: lora_A convolves, lora_B looks at single
positions.

PEFT's lora_A takes the base layer's kernel size, stride and padding, and sees all input channels at
once; lora_B takes the base layer's groups. So the kernels of grouped convolutions are laid out one
group after the other, with zeros where a kernel would see another group's channels; the rank is
that of a group, times their number. Dilation and padding other than with zeros are not there, and
such layers are refused.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from svdtune.errors import SvdtuneError


def check_kernels(kernels: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse what PEFT's LoRA cannot compute.

    Raises:
        SvdtuneError: naming the first layer, and why.
    """
    for layer, kernel in kernels.items():
        if any(step != 1 for step in kernel["dilation"]) or kernel["padding_mode"] != "zeros":
            raise SvdtuneError(
                f"{layer!r} is a convolution with dilation {kernel['dilation']} and padding mode "
                f"{kernel['padding_mode']!r}; PEFT's LoRA knows neither dilation nor padding other than zeros, so it cannot "
                "give the same outputs. Keep the adapter, or merge it"
            )


def as_lora(A: Tensor, B: Tensor, kernel: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """lora_A [r, in, k, ...] and lora_B [out, r / groups, 1, ...] with r = groups · w.

    Args:
        A: [in / groups · k ..., w].
        B: [out, w].
        kernel: an entry of a configuration's `kernels`.
    """
    shape, groups = kernel["shape"], kernel["groups"]
    own = A.mT.reshape(-1, *shape)
    wide = A.new_zeros(groups, own.shape[0], groups, *shape)
    for group in range(groups):
        wide[group, :, group] = own
    down = wide.flatten(2, 3).flatten(0, 1)
    return down.contiguous(), B.reshape(*B.shape, *(1,) * (len(shape) - 1)).contiguous()
