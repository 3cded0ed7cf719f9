"""What a test may change of PyTorch for the whole process, and how it is put back."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def kept_torch_state() -> Iterator[None]:
    """Begin in full fp32, and leave as it was: precision, default dtype, autograd, threads, CUDA's
    mode, compiled code, and what Transformers 4 tells Accelerate of a trainer's precision, which
    the next trainer of the process would take."""
    dtype, threads, grad = torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled()
    deterministic = torch.are_deterministic_algorithms_enabled()
    forbid_tf32()
    try:
        yield
    finally:
        forbid_tf32()
        torch.set_default_dtype(dtype)
        torch.set_grad_enabled(grad)
        torch.use_deterministic_algorithms(deterministic)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        if torch.cuda.is_initialized():
            torch.cuda.set_sync_debug_mode("default")
        os.environ.pop("ACCELERATE_MIXED_PRECISION", None)
        _forget_compiled()


def forbid_tf32() -> None:
    """Form fp32 products in fp32, whatever the environment allows."""
    torch.set_float32_matmul_precision("highest")
    _set_convolutions("ieee")


def allow_tf32() -> None:
    """Form fp32 products in TF32, as a user may allow it."""
    torch.set_float32_matmul_precision("high")
    _set_convolutions("tf32")


def _set_convolutions(precision: str) -> None:
    """Convolutions follow a setting of their own, which torch 2.9 renamed; later releases refuse a
    mix of both names."""
    if hasattr(torch.backends.cudnn, "conv"):
        torch.backends.cudnn.conv.fp32_precision = precision
    else:
        torch.backends.cudnn.allow_tf32 = precision == "tf32"


def _forget_compiled() -> None:
    """Drop graphs and guards, which would count towards another test's limit of recompilations."""
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None and dynamo.utils.counters:
        dynamo.reset()
        dynamo.utils.counters.clear()
