"""Triton: the stacked, rounded factors of a low-rank addition."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from svdtune.methods.compute.kernels.launch import on_device

COLUMNS = 128


@triton.jit
def _stack_rows(
    first, s, frozen, out, row0, rows_in, r, width,
    SCALED: tl.constexpr, PAIR: tl.constexpr, DIFFERENCE_FIRST: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    rows = row0 + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = rows[:, None] < rows_in
    source = tl.where(columns < r, columns, columns - r)
    real = columns < (2 * r if PAIR else r)
    at = rows[:, None].to(tl.int64) * r + source[None, :]
    needs_first = columns < r if DIFFERENCE_FIRST and PAIR else real
    value = tl.load(first + at, inside & needs_first[None, :], 0.0)
    if SCALED:
        value = value * tl.load(s + source, needs_first, 0.0)[None, :]
    if PAIR:
        difference = columns < r if DIFFERENCE_FIRST else columns >= r
        needs_frozen = real if DIFFERENCE_FIRST else real & difference
        other = tl.load(frozen + at, inside & needs_frozen[None, :], 0.0)
        value = tl.where(difference[None, :], value - other, other if DIFFERENCE_FIRST else value)
    to = rows[:, None].to(tl.int64) * width + columns[None, :]
    tl.store(out + to, value.to(out.dtype.element_ty), inside & (columns < width)[None, :])


@triton.jit
def _stack_factors(
    U, s, V, P0, V0, A, B, n, out, r, width,
    SCALED: tl.constexpr, PAIR: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    block, blocks_of_A = tl.program_id(0), tl.cdiv(n, ROWS)
    if block < blocks_of_A:
        _stack_rows(V, s, V0, A, block * ROWS, n, r, width, False, PAIR, False, ROWS, COLUMNS)
    else:
        _stack_rows(U, s, P0, B, (block - blocks_of_A) * ROWS, out, r, width, SCALED, PAIR, True, ROWS, COLUMNS)


def stack_factors(
    U: Tensor, s: Tensor | None, V: Tensor, P0: Tensor | None, V0: Tensor | None, dtype: torch.dtype, pad: int
) -> tuple[Tensor, Tensor]:
    """`lowrank.stacked` in one launch: A = [V, V − V₀] and B = [U·s − P₀, P₀], formed in fp32,
    rounded once to `dtype`.

    Args:
        U: [out, r] fp32.
        s: [r], or None for 1.
        V: [in, r].
        P0: [out, r], or None, then A = V and B = U·s; V0 [in, r] likewise.
        dtype: Of A and B.
        pad: Columns of zeros are appended up to a multiple of this.

    Returns:
        A [in, w] and B [out, w], w = r or 2r, padded. Bit for bit what `lowrank.stacked` gives.
    """
    out, r = U.shape
    n = V.shape[0]
    width = -(-(r if P0 is None else 2 * r) // pad) * pad
    A, B = V.new_empty(n, width, dtype=dtype), U.new_empty(out, width, dtype=dtype)
    U, V = U.contiguous(), V.contiguous()
    s, P0, V0 = (None if t is None else t.contiguous() for t in (s, P0, V0))
    rows = 16
    grid = (triton.cdiv(n, rows) + triton.cdiv(out, rows), triton.cdiv(width, COLUMNS))
    with on_device(U):
        # Fused into U·s − P₀, the product would not be rounded, and the difference not exactly zero
        # at the start.
        _stack_factors[grid](
            U, s, V, P0, V0, A, B, n, out, r, width,
            SCALED=s is not None, PAIR=P0 is not None, ROWS=rows, COLUMNS=COLUMNS, enable_fp_fusion=False,
        )  # fmt: skip
    return A, B
