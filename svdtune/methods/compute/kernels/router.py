"""Triton: Mo-SARA's router and mixing, t = z ∘ (softmax((z·w₁) w₂) λ), forward and backward."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from svdtune.methods.compute.kernels.launch import multiprocessors, on_device, rows_apart


@triton.jit
def _head(weights, heads, i: tl.constexpr):
    """Column i of weights [rows, heads]."""
    return tl.sum(tl.where(heads[None, :] == i, weights, 0.0), 1)


@triton.jit
def _mix(
    z, w1, w2, lam, t, gate, a, T, k, width, z_stride,
    HEADS: tl.constexpr, HEADS_UP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns, heads = tl.arange(0, COLUMNS), tl.arange(0, HEADS_UP)
    real_row, real = rows < T, columns < k
    inside = real_row[:, None] & real[None, :]
    at = rows[:, None].to(tl.int64)
    zs = tl.load(z + at * z_stride + columns[None, :], inside, 0.0).to(tl.float32)
    projected = tl.sum(zs * tl.load(w1 + columns, real, 0.0).to(tl.float32)[None, :], 1)
    w = tl.load(w2 + heads, heads < HEADS, 0.0).to(tl.float32)
    logits = tl.where(heads[None, :] < HEADS, projected[:, None] * w[None, :], float("-inf"))
    weights = tl.exp(logits - tl.max(logits, 1)[:, None])
    weights = weights / tl.sum(weights, 1)[:, None]
    values = tl.zeros((ROWS, COLUMNS), tl.float32)
    for i in tl.static_range(HEADS):
        values += _head(weights, heads, i)[:, None] * tl.load(lam + i * k + columns, real, 0.0).to(tl.float32)[None, :]
    tl.store(
        t + at * width + columns[None, :], (zs * values).to(t.dtype.element_ty),
        real_row[:, None] & (columns < width)[None, :],
    )  # fmt: skip
    tl.store(gate + at * HEADS + heads[None, :], weights, real_row[:, None] & (heads < HEADS)[None, :])
    tl.store(a + rows, projected, real_row)


@triton.jit
def _mix_backward_rows(
    dt, z, gate, lam, w1, w2, dz, dlogits, T, k, width, dt_stride, z_stride,
    HEADS: tl.constexpr, HEADS_UP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """dz and the gradient of the gate's logits: what needs whole rows."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns, heads = tl.arange(0, COLUMNS), tl.arange(0, HEADS_UP)
    real_row, real, real_head = rows < T, columns < k, heads < HEADS
    inside = real_row[:, None] & real[None, :]
    at = rows[:, None].to(tl.int64)
    dts = tl.load(dt + at * dt_stride + columns[None, :], inside, 0.0).to(tl.float32)
    dvalues = dts * tl.load(z + at * z_stride + columns[None, :], inside, 0.0).to(tl.float32)
    weights = tl.load(gate + at * HEADS + heads[None, :], real_row[:, None] & real_head[None, :], 0.0)
    dweights = tl.zeros((ROWS, HEADS_UP), tl.float32)
    values = tl.zeros((ROWS, COLUMNS), tl.float32)
    for i in tl.static_range(HEADS):
        row = tl.load(lam + i * k + columns, real, 0.0).to(tl.float32)[None, :]
        dweights += tl.where(heads[None, :] == i, tl.sum(dvalues * row, 1)[:, None], 0.0)
        values += _head(weights, heads, i)[:, None] * row
    slopes = weights * (dweights - tl.sum(weights * dweights, 1)[:, None])
    tl.store(dlogits + at * HEADS + heads[None, :], slopes, real_row[:, None] & real_head[None, :])
    da = tl.sum(slopes * tl.load(w2 + heads, real_head, 0.0).to(tl.float32)[None, :], 1)
    router = tl.load(w1 + columns, real, 0.0).to(tl.float32)
    tl.store(
        dz + at * width + columns[None, :], (dts * values + da[:, None] * router[None, :]).to(dz.dtype.element_ty),
        real_row[:, None] & (columns < width)[None, :],
    )  # fmt: skip


@triton.jit
def _mix_backward_columns(
    dt, z, gate, a, w2, dlogits, partial, T, k, dt_stride, z_stride, partial_stride, chunk,
    HEADS: tl.constexpr, HEADS_UP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """dλ, dw₁ and dw₂ of one chunk of rows: sums over rows."""
    columns, heads = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, HEADS_UP)
    part = tl.program_id(1)
    real, real_head = columns < k, heads < HEADS
    w = tl.load(w2 + heads, real_head, 0.0).to(tl.float32)
    dlam = tl.zeros((HEADS_UP, COLUMNS), tl.float32)
    dw1 = tl.zeros((ROWS, COLUMNS), tl.float32)
    dw2 = tl.zeros((ROWS, HEADS_UP), tl.float32)
    for start in range(part * chunk, tl.minimum((part + 1) * chunk, T), ROWS):
        rows = start + tl.arange(0, ROWS)
        real_row = (rows < T)[:, None]
        at = rows[:, None].to(tl.int64)
        zs = tl.load(z + at * z_stride + columns[None, :], real_row & real[None, :], 0.0).to(tl.float32)
        dts = tl.load(dt + at * dt_stride + columns[None, :], real_row & real[None, :], 0.0).to(tl.float32)
        by_head = at * HEADS + heads[None, :]
        weights = tl.load(gate + by_head, real_row & real_head[None, :], 0.0)
        slopes = tl.load(dlogits + by_head, real_row & real_head[None, :], 0.0)
        dlam = tl.dot(tl.trans(weights), zs * dts, dlam, input_precision="tf32x3")
        dw1 += tl.sum(slopes * w[None, :], 1)[:, None] * zs
        dw2 += slopes * tl.load(a + rows, rows < T, 0.0)[:, None]
    partial += part.to(tl.int64) * partial_stride
    tl.store(partial + heads[:, None] * k + columns[None, :], dlam, real_head[:, None] & real[None, :])
    tl.store(partial + HEADS * k + columns, tl.sum(dw1, 0), real)
    tl.store(partial + (HEADS + 1) * k + heads, tl.sum(dw2, 0), real_head & (tl.program_id(0) == 0))


@triton.jit
def _sum_partials(partial, dlam, dw1, dw2, programs, k, HEADS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = (HEADS + 1) * k + HEADS
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, programs, ROWS):
        rows = start + tl.arange(0, ROWS)
        inside = (rows < programs)[:, None] & (columns < total)[None, :]
        sums += tl.load(partial + rows[:, None].to(tl.int64) * total + columns[None, :], inside, 0.0)
    result = tl.sum(sums, 0)
    w1_at, w2_at = columns - HEADS * k, columns - (HEADS + 1) * k
    tl.store(dlam + columns, result.to(dlam.dtype.element_ty), w1_at < 0)
    tl.store(dw1 + w1_at, result.to(dw1.dtype.element_ty), (w1_at >= 0) & (w2_at < 0))
    tl.store(dw2 + w2_at, result.to(dw2.dtype.element_ty), (w2_at >= 0) & (columns < total))


def _tile(width: int, heads: int) -> dict[str, int]:
    """Sizes of a program's tile: whole rows, at least four, since each program reads all of λ."""
    columns = triton.next_power_of_2(width)
    return {
        "HEADS": heads,
        "HEADS_UP": max(2, triton.next_power_of_2(heads)),
        "ROWS": max(4, 4096 // columns),
        "COLUMNS": columns,
    }


def mix(z: Tensor, w1: Tensor, w2: Tensor, lam: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mo-SARA's Eq. 6 and the scaling of Eq. 5: a = z w₁, gate = softmax(a w₂), t = z ∘ (gate λ), z
    read once.

    Args:
        z: [T, width ≥ k], rows may lie apart; columns from k on are ignored.
        w1: [k].
        w2: [m].
        lam: [m, k].

    Returns:
        t [T, width] in the dtype of z, zero from column k on; gate [T, m] and a [T] in fp32.
    """
    (T, width), (heads, k) = z.shape, lam.shape
    z, w1, w2, lam = rows_apart(z), w1.contiguous(), w2.contiguous(), lam.contiguous()
    t = z.new_empty(T, width)
    gate, a = (z.new_empty(shape, dtype=torch.float32) for shape in ((T, heads), (T,)))
    tile = _tile(width, heads)
    if T:
        with on_device(z):
            _mix[(triton.cdiv(T, tile["ROWS"]),)](
                z, w1, w2, lam, t, gate, a, T, k, width, z.stride(0), **tile, num_warps=4
            )
    return t, gate, a


def mix_backward(
    dt: Tensor, z: Tensor, gate: Tensor, a: Tensor, lam: Tensor, w1: Tensor, w2: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `mix` from dt [T, width] and what it returned; dt and z are read twice, the
    second time for the sums.

    Returns:
        dz [T, width] in the dtype of z, zero from column k on; dλ, dw₁ and dw₂ in the dtypes and
        shapes of λ, w₁ and w₂.
    """
    (T, width), (heads, k) = z.shape, lam.shape
    dt, z, gate, a = rows_apart(dt), rows_apart(z), gate.contiguous(), a.contiguous()
    lam, w1, w2 = lam.contiguous(), w1.contiguous(), w2.contiguous()
    dz, dlogits = z.new_empty(T, width), torch.empty_like(gate)
    dlam, dw1, dw2 = (torch.empty_like(t) for t in (lam, w1, w2))
    tile = _tile(width, heads)
    blocks, step = triton.cdiv(k, 64), 32
    chunk = triton.cdiv(T * blocks, 8 * multiprocessors(z) * step) * step or step
    parts, total = triton.cdiv(T, chunk), (heads + 1) * k + heads
    partial = z.new_empty(parts, total, dtype=torch.float32)
    strides = dt.stride(0), z.stride(0)
    with on_device(z):
        if T:
            _mix_backward_rows[(triton.cdiv(T, tile["ROWS"]),)](
                dt, z, gate, lam, w1, w2, dz, dlogits, T, k, width, *strides,
                **tile, num_warps=4 if tile["COLUMNS"] <= 1024 else 8,
            )  # fmt: skip
            _mix_backward_columns[(blocks, parts)](
                dt, z, gate, a, w2, dlogits, partial, T, k, *strides, total, chunk,
                HEADS=heads, HEADS_UP=max(16, tile["HEADS_UP"]), ROWS=step, COLUMNS=64, num_warps=4,
            )  # fmt: skip
        _sum_partials[(triton.cdiv(total, 128),)](partial, dlam, dw1, dw2, parts, k, HEADS=heads, ROWS=16, COLUMNS=128)
    return dz, dlam, dw1, dw2
