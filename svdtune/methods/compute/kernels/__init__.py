"""Triton kernels for what PyTorch would do in many small launches, or with a stored mask; plain
functions on CUDA tensors.

    stack_factors                                  the factors of SARA and SORSA
    dropout_seed, dropout_mask                     a mask that is a function of (seed, row, column)
    dropout_mm, dropout_mm_transposed, add_dropout_mm_products with that mask, never stored
    mix, mix_backward                              Mo-SARA's router

Nothing here imports Triton before a kernel is launched. Call `available` first: every function but
the two that make masks needs CUDA tensors in fp32, fp16 or bf16, with fp32 accumulation inside.
Results do not depend on the order in which programs run: no atomics. Under `torch.compile` each is
one opaque operator, `torch.ops.svdtune.<name>`; without it, a direct launch.
"""

from svdtune.methods.compute.kernels.mask import dropout_mask, dropout_seed
from svdtune.methods.compute.kernels.ops import (
    add_dropout_mm_,
    available,
    dropout_mm,
    dropout_mm_transposed,
    mix,
    mix_backward,
    stack_factors,
)

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
