"""Triton: Mo-SARA's router and mixing, t = z ∘ (softmax((z·w₁) w₂) λ), forward and backward with each tensor read once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from svdtune.methods.kernels.launch import on_device

TILE = 8192  # elements of z that one program holds in registers


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
def _mix_backward(
    dt, z, gate, a, lam, w1, w2, dz, partial, T, k, width, dt_stride, z_stride, partial_stride,
    HEADS: tl.constexpr, HEADS_UP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    rows = program * ROWS + tl.arange(0, ROWS)
    columns, heads = tl.arange(0, COLUMNS), tl.arange(0, HEADS_UP)
    real_row, real, real_head = rows < T, columns < k, heads < HEADS
    inside = real_row[:, None] & real[None, :]
    at = rows[:, None].to(tl.int64)
    zs = tl.load(z + at * z_stride + columns[None, :], inside, 0.0).to(tl.float32)
    dts = tl.load(dt + at * dt_stride + columns[None, :], inside, 0.0).to(tl.float32)
    weights = tl.load(gate + at * HEADS + heads[None, :], real_row[:, None] & real_head[None, :], 0.0)
    partial += program.to(tl.int64) * partial_stride

    dvalues = zs * dts
    dweights = tl.zeros((ROWS, HEADS_UP), tl.float32)
    values = tl.zeros((ROWS, COLUMNS), tl.float32)
    for i in tl.static_range(HEADS):
        row = tl.load(lam + i * k + columns, real, 0.0).to(tl.float32)
        weight = _head(weights, heads, i)[:, None]
        dweights += tl.where(heads[None, :] == i, tl.sum(dvalues * row[None, :], 1)[:, None], 0.0)
        values += weight * row[None, :]
        tl.store(partial + i * k + columns, tl.sum(weight * dvalues, 0), real)

    dlogits = weights * (dweights - tl.sum(weights * dweights, 1)[:, None])
    projected = tl.load(a + rows, real_row, 0.0)
    tl.store(partial + (HEADS + 1) * k + heads, tl.sum(projected[:, None] * dlogits, 0), real_head)
    da = tl.sum(dlogits * tl.load(w2 + heads, real_head, 0.0).to(tl.float32)[None, :], 1)
    tl.store(partial + HEADS * k + columns, tl.sum(da[:, None] * zs, 0), real)
    router = tl.load(w1 + columns, real, 0.0).to(tl.float32)
    tl.store(
        dz + at * width + columns[None, :], (dts * values + da[:, None] * router[None, :]).to(dz.dtype.element_ty),
        real_row[:, None] & (columns < width)[None, :],
    )  # fmt: skip


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
    """Sizes of a program's tile: whole rows, as many as fit."""
    columns = triton.next_power_of_2(width)
    return {
        "HEADS": heads,
        "HEADS_UP": max(2, triton.next_power_of_2(heads)),
        "ROWS": max(1, TILE // columns),
        "COLUMNS": columns,
    }


def _rows_apart(x: Tensor) -> Tensor:
    """x itself where its rows are contiguous, however far apart they lie."""
    return x if x.stride(1) == 1 else x.contiguous()


def mix(z: Tensor, w1: Tensor, w2: Tensor, lam: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    (T, width), (heads, k) = z.shape, lam.shape
    z, w1, w2, lam = _rows_apart(z), w1.contiguous(), w2.contiguous(), lam.contiguous()
    t = z.new_empty(T, width)
    gate, a = (z.new_empty(shape, dtype=torch.float32) for shape in ((T, heads), (T,)))
    tile = _tile(width, heads)
    if T:
        with on_device(z):
            _mix[(triton.cdiv(T, tile["ROWS"]),)](
                z, w1, w2, lam, t, gate, a, T, k, width, z.stride(0), **tile, num_warps=8
            )
    return t, gate, a


def mix_backward(
    dt: Tensor, z: Tensor, gate: Tensor, a: Tensor, lam: Tensor, w1: Tensor, w2: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (T, width), (heads, k) = z.shape, lam.shape
    dt, z, gate, a = _rows_apart(dt), _rows_apart(z), gate.contiguous(), a.contiguous()
    lam, w1, w2 = lam.contiguous(), w1.contiguous(), w2.contiguous()
    dz = z.new_empty(T, width)
    dlam, dw1, dw2 = (torch.empty_like(t) for t in (lam, w1, w2))
    tile = _tile(width, heads)
    programs, total = triton.cdiv(T, tile["ROWS"]), (heads + 1) * k + heads
    partial = z.new_empty(programs, total, dtype=torch.float32)
    with on_device(z):
        if T:
            _mix_backward[(programs,)](
                dt,
                z,
                gate,
                a,
                lam,
                w1,
                w2,
                dz,
                partial,
                T,
                k,
                width,
                dt.stride(0),
                z.stride(0),
                total,
                **tile,
                num_warps=8,
            )
        _sum_partials[(triton.cdiv(total, 64),)](partial, dlam, dw1, dw2, programs, k, HEADS=heads, ROWS=64, COLUMNS=64)
    return dz, dlam, dw1, dw2
