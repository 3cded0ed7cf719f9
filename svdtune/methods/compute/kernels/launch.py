"""What every launch needs: the tensor's device made current, rows that can be read, and how many
programs and tiles the device holds."""

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
from torch import Tensor


def on_device(x: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensors' own."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def rows_apart(x: Tensor) -> Tensor:
    """x itself where its rows are contiguous, however far apart they lie."""
    return x if x.stride(1) == 1 else x.contiguous()


@functools.cache
def _device(index: int) -> tuple[int, int]:
    properties = triton.runtime.driver.active.utils.get_device_properties(index)
    return properties["multiprocessor_count"], properties["max_shared_mem"]


def multiprocessors(x: Tensor) -> int:
    """How many programs run side by side on the device of `x`; 2 for Triton's interpreter, which
    runs on the CPU."""
    return _device(x.get_device())[0] if x.is_cuda else 2


def stages(x: Tensor, elements: int, at_most: int) -> int:
    """How many tiles of so many elements a program may have in flight: what shared memory holds, at
    most `at_most`.

    An fp32 product keeps one more tile's worth, for the parts that it is split into.
    """
    if not x.is_cuda:
        return 1
    room = _device(x.get_device())[1] // (elements * x.element_size()) - (x.element_size() > 2)
    return max(1, min(at_most, room))


def dot_precision(x: Tensor) -> str:
    """How tensor cores multiply fp32: split in three, as exact as fp32 arithmetic. Narrower dtypes
    ignore it."""
    return "tf32x3" if x.dtype == torch.float32 else "tf32"
