"""Triton kernels for what PyTorch would do in many small launches, or with a stored mask; plain
functions on CUDA tensors.

    stack_factors                                  the factors of SARA and SORSA
    dropout_seed, dropout_mask                     a mask that is a function of (seed, row, column)
    dropout_mm, dropout_mm_transposed, add_dropout_mm_products with that mask, never stored
    mix, mix_backward                              Mo-SARA's router

Nothing here imports Triton before a kernel is launched. Call `available` first: every function but
the two that make masks needs CUDA tensors in fp32, fp16 or bf16, with fp32 accumulation inside.
Results do not depend on the order in which programs run: no atomics. Compiled code takes none of
them, since the compiler fuses by itself.
"""

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from svdtune.methods.compute.kernels.mask import dropout_mask, dropout_seed
from svdtune.methods.compute.transforms import under_transform

if TYPE_CHECKING:
    from svdtune.methods.compute.kernels.dropout import add_dropout_mm_, dropout_mm, dropout_mm_transposed
    from svdtune.methods.compute.kernels.factors import stack_factors
    from svdtune.methods.compute.kernels.router import mix, mix_backward

__all__ = [
    "add_dropout_mm_",
    "available",
    "dropout_mask",
    "dropout_mm",
    "dropout_mm_transposed",
    "dropout_seed",
    "mix",
    "mix_backward",
    "stack_factors",
]

HAS_TRITON = importlib.util.find_spec("triton") is not None
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_FILES = {"mix": "router", "mix_backward": "router", "stack_factors": "factors"}


def available(*tensors: Tensor | None) -> bool:
    """Whether the kernels can take these tensors: Triton installed, all on an NVIDIA GPU, none
    wider than fp32, no transform of torch.func at work, not under `torch.compile`."""
    return (
        HAS_TRITON
        and torch.version.hip is None
        and not torch.compiler.is_compiling()
        and not under_transform()
        and all(t is None or (t.is_cuda and t.dtype in DTYPES) for t in tensors)
    )


def __getattr__(name: str) -> Any:
    """A function that launches a kernel, from its file, which imports Triton: at the first use."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(f"{__name__}.{_FILES.get(name, 'dropout')}"), name)
    globals()[name] = found
    return found
