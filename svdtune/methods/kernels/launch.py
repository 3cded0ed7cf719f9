"""What every launch needs: the tensor's device made current, and how many programs fill it."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def on_device(x: Tensor) -> AbstractContextManager:
    """Triton launches on the current device, which need not be the tensors' own."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def multiprocessors(x: Tensor) -> int:
    """How many programs run side by side on the device of `x`; 2 for Triton's interpreter, which runs on the CPU."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 2


def dot_precision(x: Tensor) -> str:
    """How tensor cores multiply fp32: split in three, as exact as fp32 arithmetic. Narrower dtypes ignore it."""
    return "tf32x3" if x.dtype == torch.float32 else "tf32"
