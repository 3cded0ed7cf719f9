"""Triton: products of a dropped-out matrix whose mask is hashed anew in each kernel, see `mask`. No
mask is ever stored.

x is masked on its way from memory to the tensor cores; the scale 1/(1−p) meets the small result.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from svdtune.methods.compute.kernels import mask
from svdtune.methods.compute.kernels.launch import dot_precision, multiprocessors, on_device, rows_apart, stages

MIX_1, MIX_2 = tl.constexpr(mask.MIX_1), tl.constexpr(mask.MIX_2)
GOLDEN, WORD = tl.constexpr(mask.GOLDEN), tl.constexpr(mask.WORD)


@triton.jit
def _mixed(x):
    x = x ^ (x >> 16)
    x = x * MIX_1
    x = x ^ (x >> 15)
    x = x * MIX_2
    return x ^ (x >> 16)


@triton.jit
def _keys(seed):
    value = tl.load(seed)
    row_key = _mixed(((value & WORD).to(tl.uint32, bitcast=False) + tl.full((), GOLDEN, tl.uint32)).to(tl.uint32))
    column_key = _mixed(((value >> 32) & WORD).to(tl.uint32) ^ row_key)
    return row_key, column_key


@triton.jit
def _hashed(index, key):
    return _mixed(index.to(tl.uint32) ^ key)


@triton.jit
def _kept(row_hash, column_hash, THRESHOLD: tl.constexpr):
    x = row_hash ^ column_hash
    x = x * MIX_1
    x = x ^ (x >> 16)
    x = x * MIX_2
    return x >= tl.full((), THRESHOLD, tl.uint32)


@triton.jit
def _dropout_mm(
    x, A, z, seed, T, d, w, x_stride, chunk, SCALE: tl.constexpr, THRESHOLD: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    part = tl.program_id(2)
    row_key, column_key = _keys(seed)
    row_hash = _hashed(rows, row_key)
    x_at = x + rows[:, None].to(tl.int64) * x_stride
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(part * chunk, tl.minimum((part + 1) * chunk, d), INNER):
        inner = start + tl.arange(0, INNER)
        real = inner < d
        xs = tl.load(x_at + inner[None, :], (rows < T)[:, None] & real[None, :], 0.0)
        xs = tl.where(_kept(row_hash[:, None], _hashed(inner, column_key)[None, :], THRESHOLD), xs, 0.0)
        weights = tl.load(A + inner[:, None] * w + columns[None, :], real[:, None] & (columns < w)[None, :], 0.0)
        total = tl.dot(xs, weights, total, input_precision=PRECISION)
    to = z + (part * T + rows[:, None].to(tl.int64)) * w + columns[None, :]
    tl.store(to, (total * SCALE).to(z.dtype.element_ty), (rows < T)[:, None] & (columns < w)[None, :])


@triton.jit
def _dropout_mm_transposed(
    x, Q, out, seed, T, d, w, x_stride, q_stride, chunk,
    SCALE: tl.constexpr, THRESHOLD: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # of the result: columns of x
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    part = tl.program_id(2)
    row_key, column_key = _keys(seed)
    column_hash = _hashed(rows, column_key)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(part * chunk, tl.minimum((part + 1) * chunk, T), INNER):
        inner = start + tl.arange(0, INNER)
        real = inner < T
        at = inner[:, None].to(tl.int64)
        xs = tl.load(x + at * x_stride + rows[None, :], real[:, None] & (rows < d)[None, :], 0.0)
        xs = tl.where(_kept(_hashed(inner, row_key)[:, None], column_hash[None, :], THRESHOLD), xs, 0.0)
        qs = tl.load(Q + at * q_stride + columns[None, :], real[:, None] & (columns < w)[None, :], 0.0)
        total = tl.dot(tl.trans(xs), qs, total, input_precision=PRECISION)
    to = out + (part * d + rows[:, None].to(tl.int64)) * w + columns[None, :]
    tl.store(to, total * SCALE, (rows < d)[:, None] & (columns < w)[None, :])


@triton.jit
def _add_dropout_mm(
    dx, Q, A, seed, T, d, w, dx_stride, q_stride,
    SCALE: tl.constexpr, THRESHOLD: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    # Neighbouring programs share rows of Q and, through the cache, all of A.
    blocks = tl.cdiv(d, COLUMNS)
    rows = (tl.program_id(0) // blocks) * ROWS + tl.arange(0, ROWS)
    columns = (tl.program_id(0) % blocks) * COLUMNS + tl.arange(0, COLUMNS)
    at = rows[:, None].to(tl.int64)
    inside = (rows < T)[:, None] & (columns < d)[None, :]
    to = dx + at * dx_stride + columns[None, :]
    old = tl.load(to, inside, 0.0)  # on its way while the product is computed
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, w, INNER):
        inner = start + tl.arange(0, INNER)
        real = inner < w
        qs = tl.load(Q + at * q_stride + inner[None, :], (rows < T)[:, None] & real[None, :], 0.0)
        weights = tl.load(A + columns[:, None] * w + inner[None, :], (columns < d)[:, None] & real[None, :], 0.0)
        total = tl.dot(qs, tl.trans(weights), total, input_precision=PRECISION)
    total *= SCALE
    row_key, column_key = _keys(seed)
    kept = _kept(_hashed(rows, row_key)[:, None], _hashed(columns, column_key)[None, :], THRESHOLD)
    total = tl.where(kept, total, 0.0)
    tl.store(to, (old.to(tl.float32) + total).to(dx.dtype.element_ty), inside)


def _constants(x: Tensor, p: float) -> dict[str, float | int | str]:
    return {"SCALE": 1 / (1 - p), "THRESHOLD": mask.drop_threshold(p), "PRECISION": dot_precision(x)}


def _columns(w: int) -> int:
    """How many columns of the narrow matrix one program takes: all of them up to 256, so that x is
    read once."""
    return min(256, max(16, triton.next_power_of_2(w)))


def _chunk(length: int, parts: int, step: int) -> tuple[int, int]:
    """The length of each part, a multiple of the step, and how many parts that makes."""
    chunk = triton.cdiv(triton.cdiv(length, parts), step) * step
    return chunk, triton.cdiv(length, chunk)


def dropout_mm(x: Tensor, A: Tensor, p: float, seed: Tensor) -> Tensor:
    """z = (keep ∘ x) A / (1 − p), with keep = `dropout_mask(x.shape, p, seed)`.

    Args:
        x: [T, d]; rows may lie apart.
        A: [d, w], the dtype of x.
        p: 0 < p < 1.
        seed: See `dropout_seed`; on the device of x.

    Returns:
        [T, w] in the dtype of x.
    """
    (T, d), w = x.shape, A.shape[1]
    x, A = rows_apart(x), A.contiguous()
    wide = x.element_size() > 2
    columns, inner = _columns(w), 32 if wide else 64
    # Each program reads all of its columns of A: with many columns, more rows share that.
    rows, warps, deep = (128, 8, 3) if columns > 128 else (64, 4, 4)
    blocks = triton.cdiv(T, rows) * triton.cdiv(w, columns)
    if T == 0:
        return x.new_empty(T, w)
    chunk, parts = _chunk(d, max(1, min(8, multiprocessors(x) // blocks)), inner)
    z = x.new_empty(parts, T, w, dtype=x.dtype if parts == 1 else torch.float32)
    with on_device(x):
        _dropout_mm[(triton.cdiv(T, rows), triton.cdiv(w, columns), parts)](
            x, A, z, seed, T, d, w, x.stride(0), chunk, **_constants(x, p),
            ROWS=rows, COLUMNS=columns, INNER=inner,
            num_warps=warps, num_stages=stages(x, (rows + columns) * inner, deep),
        )  # fmt: skip
    return z[0] if parts == 1 else z.sum(0).to(x.dtype)


def dropout_mm_transposed(x: Tensor, Q: Tensor, p: float, seed: Tensor) -> Tensor:
    """(keep ∘ x)ᵀ Q / (1 − p), [d, w] in fp32, for x [T, d] and Q [T, w] of one dtype."""
    (T, d), w = x.shape, Q.shape[1]
    x, Q = rows_apart(x), rows_apart(Q)
    wide = x.element_size() > 2
    columns, rows, inner = min(128, _columns(w)), 128, 32 if wide else 64
    blocks = triton.cdiv(d, rows) * triton.cdiv(w, columns)
    chunk, parts = _chunk(max(T, 1), max(1, min(16, 2 * multiprocessors(x) // blocks)), inner)
    out = x.new_empty(parts, d, w, dtype=torch.float32)
    with on_device(x):
        _dropout_mm_transposed[(triton.cdiv(d, rows), triton.cdiv(w, columns), parts)](
            x, Q, out, seed, T, d, w, x.stride(0), Q.stride(0), chunk, **_constants(x, p),
            ROWS=rows, COLUMNS=columns, INNER=inner, num_warps=8, num_stages=stages(x, (rows + columns) * inner, 3),
        )  # fmt: skip
    return out[0] if parts == 1 else out.sum(0)


def add_dropout_mm_(dx: Tensor, Q: Tensor, A: Tensor, p: float, seed: Tensor) -> Tensor:
    """dx += keep ∘ (Q Aᵀ) / (1 − p), in place, for dx [T, d], Q [T, w] and A [d, w]; added in fp32,
    rounded once."""
    (T, d), w = dx.shape, A.shape[1]
    Q, A = rows_apart(Q), A.contiguous()
    wide = Q.element_size() > 2
    rows, columns, inner = 64, 128, 32 if wide else 64
    if T == 0:
        return dx
    with on_device(dx):
        _add_dropout_mm[(triton.cdiv(T, rows) * triton.cdiv(d, columns),)](
            dx, Q, A, seed, T, d, w, dx.stride(0), Q.stride(0), **_constants(Q, p),
            ROWS=rows, COLUMNS=columns, INNER=inner, num_warps=4, num_stages=stages(Q, (rows + columns) * inner, 3),
        )  # fmt: skip
    return dx
