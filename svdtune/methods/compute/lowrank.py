"""The trained low-rank addition that SARA and SORSA share, as one autograd node a layer.

    y = x Wᵀ + b + x (P Vᵀ − P₀ V₀ᵀ)ᵀ      with P = U diag(s)

x [T, in], W [out, in], U and P₀ [out, r], s [r], V and V₀ [in, r]; P₀ V₀ᵀ is the frozen principal
part that SORSA's delta layout takes away, absent otherwise. The difference is formed in the
factors' own precision before anything is rounded:

    P Vᵀ − P₀ V₀ᵀ = (P − P₀) Vᵀ + P₀ (V − V₀)ᵀ

Stacked as A = [V, V − V₀] and B = [P − P₀, P₀] this costs what the plain stacking costs, is exactly
zero before the first step, and in bf16 rounds the change of the weight instead of the difference of
two large products.

Against autograd's own bookkeeping the node saves x and x V alone, adds into the outputs of the base
matmuls, and makes no pass over a [T, in] or [T, out] tensor that is not a matrix product.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from svdtune.methods.compute import kernels
from svdtune.methods.compute.transforms import under_transform


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype a linear layer computes in: autocast's where autocast is on, else the input's."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x.to(dtype)`, which takes a microsecond even where there is nothing to do."""
    return x if x.dtype == dtype else x.to(dtype)


def scaled(U: Tensor, s: Tensor | None) -> Tensor:
    """P = U diag(s), or U where there is no s."""
    return U if s is None else U * s


class Product(NamedTuple):
    """P Vᵀ − P₀ V₀ᵀ with P = U diag(s), the shapes as at the head of this file. Without s P is U;
    without P₀ and V₀ nothing is taken away. All may have leading dimensions."""

    U: Tensor
    s: Tensor | None
    V: Tensor
    P0: Tensor | None = None
    V0: Tensor | None = None


def stacked(product: Product, dtype: torch.dtype, pad: int = 1) -> tuple[Tensor, Tensor]:
    """The pair A [in, w], B [out, w] with A Bᵀ = (P Vᵀ − P₀ V₀ᵀ)ᵀ, rounded to `dtype` last.

    w is r, or 2r if a principal part is taken away. Zero columns fill it up to a multiple of
    `pad`.
    """
    if kernels.available(*product):
        return kernels.stack_factors(*product, dtype, pad)
    A, B = pair(product, dtype)
    return filled(A, pad), filled(B, pad)


def pair(product: Product, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """A = [V, V − V₀] and B = [P − P₀, P₀]; V and P if nothing is taken away. So the change of the
    weight is B Aᵀ. Each half is rounded to `dtype`, if one is given, before they are joined: so a
    compiler forms A and B in one kernel each."""
    U, s, V, P0, V0 = product

    def joined(*halves: Tensor) -> Tensor:
        rounded = [half if dtype is None else cast(half, dtype) for half in halves]
        return rounded[0] if len(rounded) == 1 else torch.cat(rounded, -1)

    P = scaled(U, s)
    if P0 is None or V0 is None:
        return joined(V), joined(P)
    return joined(V, V - V0), joined(P - P0, P0)


def filled(x: Tensor, pad: int) -> Tensor:
    """x with zero columns appended up to a multiple of `pad`."""
    return F.pad(x, (0, -x.shape[-1] % pad)) if x.shape[-1] % pad else x


def alignment(dtype: torch.dtype, device: torch.device) -> int:
    """The multiple of columns that tensor cores want: 16-bit rows on a GPU are read 16 bytes at a
    time."""
    return 8 if device.type == "cuda" and dtype.itemsize == 2 else 1


def tall_product(X: Tensor, Q: Tensor, dtype: torch.dtype) -> Tensor:
    """Xᵀ Q in `dtype`. 16-bit products on a GPU leave their fp32 sums unrounded if that is asked
    for."""
    if X.is_cuda and X.dtype.itemsize == 2 and dtype == torch.float32:
        return torch.mm(X.mT, Q, out_dtype=dtype)
    return cast(X.mT @ Q, dtype)


class Part(NamedTuple):
    """One linear layer and its addition. `LowRankLinear` takes the tensors one by one, since
    autograd sees none inside a tuple."""

    weight: Tensor | None
    bias_or_output: Tensor | None
    product: Product


class LowRankLinear(torch.autograd.Function):
    """Linear layers that read one input, each with its low-rank addition, in one node; most often
    it is a single layer.

    What an addition is added to is either the pair (weight, bias), then the node computes x Wᵀ + b
    itself, or (None, y), then it adds to y in place. For dropout on the low-rank path's input,
    either `x_adapter` is that input, or `p` > 0 draws the mask inside the kernels (CUDA), where
    neither the mask nor the masked input is ever stored. Several layers share the products with x,
    the mask, and the sum of their input gradients. Base weights get no gradient. Differentiating
    twice is refused by PyTorch with an error.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, x_adapter: Tensor | None, p: float, *tensors: Any) -> Tensor | tuple[Tensor, ...]:
        parts = as_parts(tensors)
        dtype = compute_dtype(x)
        pad = alignment(dtype, x.device)
        A, Bs = stacked_parts(parts, dtype, pad)
        flat = cast(x if x_adapter is None else x_adapter, dtype)
        flat = flat.reshape(-1, flat.shape[-1])
        seed = kernels.dropout_seed(x.device) if p > 0 else None
        z = flat @ A if seed is None else kernels.dropout_mm(flat, A, p, seed)
        outputs, projected = [], []
        for part, B, own in zip(parts, Bs, apart(z, Bs), strict=True):
            if part.weight is None:
                assert part.bias_or_output is not None
                ctx.mark_dirty(part.bias_or_output)
                y = add_product(part.bias_or_output, own, B)
            else:
                bias = None if part.bias_or_output is None else cast(part.bias_or_output, dtype)
                y = linear_plus(cast(x, dtype), cast(part.weight, dtype), bias, own, B)
            outputs.append(y)
            if part.product.P0 is not None:
                # x V without x (V − V₀), up to the next full column block: what is too much is cut
                # off the product
                r = part.product.V.shape[1]
                own = own[:, : min(own.shape[1], r + -r % pad)]
            projected.append(own.contiguous() if z.numel() > WORTH_A_COPY else own)
        saved = list(tensors)
        saved[1::FIELDS] = [None] * len(parts)
        # Pairs are worth keeping where they are small beside x; else forming them again costs less
        # memory.
        kept = A.numel() + sum([B.numel() for B in Bs]) <= flat.numel() // 8
        pair = (A, *Bs) if kept else [None] * (1 + len(Bs))
        ctx.save_for_backward(flat, seed, *pair, *projected, *saved)
        ctx.shape, ctx.p = x.shape, p
        ctx.dtypes = (x.dtype, None if x_adapter is None else x_adapter.dtype)
        if len(outputs) == 1:
            return outputs[0]
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        n = len(grads)
        flat, seed, A, *saved = ctx.saved_tensors
        Bs, projected, parts = saved[:n], saved[n : 2 * n], as_parts(saved[2 * n :])
        used = [i for i, grad in enumerate(grads) if grad is not None]
        if len(used) < n:
            projected, parts = [projected[i] for i in used], [parts[i] for i in used]
            grads = tuple(grads[i] for i in used)
            A = None
        dtype = flat.dtype
        pad = alignment(dtype, flat.device)
        if A is None:
            A, Bs = stacked_parts(parts, dtype, pad)
        needs_x, needs_adapter, _, *needs = ctx.needs_input_grad
        dYs = [cast(grad, dtype).reshape(-1, grad.shape[-1]) for grad in grads]
        Q = products_beside(dYs, Bs)

        dx = dx_adapter = None
        x_dtype, adapter_dtype = ctx.dtypes
        if needs_adapter:
            dx_adapter = cast((Q @ A.mT).view(ctx.shape), adapter_dtype)
        if needs_x:
            weights = [part.weight for part in parts]
            dx = input_gradient(dYs, weights, None if adapter_dtype is not None else Q, A, ctx.p, seed)
            dx = None if dx is None else cast(dx.view(ctx.shape), x_dtype)

        dVs = V_gradients(flat, Q, parts, Bs, pad, ctx.p, seed) if any(needs[4::FIELDS]) else [None] * len(parts)
        gradients: list[Tensor | None] = [None] * len(needs)
        for i, part, z, dY, dV, grad in zip(used, parts, projected, dYs, dVs, grads, strict=True):
            needs_base, needs_U, needs_s = needs[i * FIELDS + 1 : i * FIELDS + 4]
            U, s, V, _, _ = part.product
            dU = ds = dbase = None
            if needs_U or needs_s:
                M = tall_product(dY, z, U.dtype)
                M = M if M.shape[1] == V.shape[1] else M[:, : V.shape[1]]
                ds = None if s is None else cast((M * U).sum(0), s.dtype)
                dU = scaled(M, s)
            if needs_base:
                dbase = grad if part.weight is None else dY.sum(0)
            gradients[i * FIELDS + 1 : i * FIELDS + 5] = dbase, dU, ds, dV
        return dx, dx_adapter, None, *gradients


FIELDS = 2 + len(Product._fields)

WORTH_A_COPY = 2**21
"""Elements of x A from which on saving a part repays its copy: a view would keep the whole."""


def as_parts(flat: Sequence[Any]) -> list[Part]:
    """`Part`s from the flat arguments of an autograd function."""
    starts = range(0, len(flat), FIELDS)
    return [Part(flat[i], flat[i + 1], Product(*flat[i + 2 : i + FIELDS])) for i in starts]


def stacked_parts(parts: list[Part], dtype: torch.dtype, pad: int) -> tuple[Tensor, list[Tensor]]:
    """The A's of all parts side by side, and their B's."""
    pairs = [stacked(part.product, dtype, pad) for part in parts]
    return beside([A for A, _ in pairs]), [B for _, B in pairs]


def beside(matrices: list[Tensor]) -> Tensor:
    """Matrices [n, ...] side by side; a single one as it is."""
    return matrices[0] if len(matrices) == 1 else torch.cat(matrices, 1)


def apart(matrix: Tensor, like: list[Tensor]) -> Sequence[Tensor]:
    """Views of the columns of `matrix`, each as wide as the matrix of its place in `like`."""
    return [matrix] if len(like) == 1 else matrix.split([one.shape[1] for one in like], 1)


def products_beside(dYs: list[Tensor], Bs: list[Tensor]) -> Tensor:
    """The products dY B side by side, each written where it belongs."""
    if len(dYs) == 1:
        return dYs[0] @ Bs[0]
    Q = dYs[0].new_empty(len(dYs[0]), sum(B.shape[1] for B in Bs))
    for dY, B, own in zip(dYs, Bs, apart(Q, Bs), strict=True):
        torch.mm(dY, B, out=own)
    return Q


def V_gradients(
    flat: Tensor, Q: Tensor, parts: list[Part], Bs: list[Tensor], pad: int, p: float, seed: Tensor | None
) -> list[Tensor]:
    """dV = xᵀ Q of each part; where A = [V, V − V₀] both halves of Q belong to V."""
    products, halves = [part.product for part in parts], []
    for product, q in zip(products, apart(Q, Bs), strict=True):
        r = product.V.shape[1]
        halves.append(q if product.P0 is None else filled(q[:, :r] + q[:, r : 2 * r], pad))
    Q = Q if all(product.P0 is None for product in products) else beside(halves)
    dtype = products[0].V.dtype
    for product in products[1:]:  # adapters of different make may lie in one group
        dtype = torch.promote_types(dtype, product.V.dtype)
    dV = tall_product(flat, Q, dtype) if seed is None else cast(kernels.dropout_mm_transposed(flat, Q, p, seed), dtype)
    return [
        cast(own if own.shape[1] == V.shape[1] else own[:, : V.shape[1]], V.dtype)
        for (_, _, V, _, _), own in zip(products, apart(dV, halves), strict=True)
    ]


def linear_with_pair(x: Tensor, part: Part, A: Tensor, B: Tensor) -> Tensor:
    """The forward pass of `LowRankLinear` for one layer, to the bit, of which nothing is saved."""
    x, weight, given = cast(x, A.dtype), part.weight, part.bias_or_output
    z = x.reshape(-1, x.shape[-1]) @ A
    if weight is None:
        assert given is not None
        return add_product(given, z, B)
    return linear_plus(x, cast(weight, A.dtype), None if given is None else cast(given, A.dtype), z, B)


def add_product(y: Tensor, z: Tensor, B: Tensor) -> Tensor:
    """y [..., out] + z Bᵀ for z [T, w], added to y in place."""
    y.view(-1, y.shape[-1]).addmm_(cast(z, y.dtype), cast(B, y.dtype).mT)
    return y


def linear_plus(x: Tensor, weight: Tensor, bias: Tensor | None, z: Tensor, B: Tensor) -> Tensor:
    """x Wᵀ + b + z Bᵀ. On a GPU the small product comes first: the large one then adds it while it
    computes, so the output is written twice instead of written, read and written. Elsewhere the
    large one comes first, exactly as the base's own.
    """
    if x.is_cuda:
        y = z @ B.mT if bias is None else torch.addmm(bias, z, B.mT)
        return y.addmm_(x.reshape(-1, x.shape[-1]), weight.mT).view(*x.shape[:-1], -1)
    y = F.linear(x, weight, bias)
    y.view(-1, y.shape[-1]).addmm_(z, B.mT)
    return y


def input_gradient(
    dYs: list[Tensor], weights: list[Tensor | None], Q: Tensor | None, A: Tensor, p: float, seed: Tensor | None
) -> Tensor | None:
    """Σ dY W + Q Aᵀ [T, in]. A term whose factor is None is left out. With a seed the last term is
    masked."""
    large = [(dY, cast(W, dY.dtype)) for dY, W in zip(dYs, weights, strict=True) if W is not None]
    dx = None
    # the small product first, as in `linear_plus`
    if Q is not None and seed is None and (A.is_cuda or not large):
        dx, Q = Q @ A.mT, None
    for dY, W in large:
        dx = dY @ W if dx is None else dx.addmm_(dY, W)
    if Q is not None and seed is not None:
        dx = A.new_zeros(len(Q), len(A)) if dx is None else dx
        return kernels.add_dropout_mm_(dx, Q, A, p, seed)
    return dx if Q is None or dx is None else dx.addmm_(Q, A.mT)


def low_rank_linear(
    x: Tensor,
    weight: Tensor | None,
    bias_or_output: Tensor | None,
    product: Product,
    x_adapter: Tensor | None = None,
    p: float = 0.0,
) -> Tensor:
    """x Wᵀ + b + x (U diag(s) Vᵀ − P₀ V₀ᵀ)ᵀ, the shapes as at the head of this file; x may have
    leading dimensions. For a base layer whose weight must not be read, None and that layer's output
    y: the term is added to y in place.

    Dropout on the input of the second term: give that input as `x_adapter`, or on CUDA its
    probability as `p`.
    """
    if under_transform():
        return _in_plain(x, x_adapter, Part(weight, bias_or_output, product))
    return LowRankLinear.apply(x, x_adapter, p, weight, bias_or_output, *product)


def _in_plain(x: Tensor, x_adapter: Tensor | None, part: Part) -> Tensor:
    """The result of `LowRankLinear`, not in place, in operations that torch.func transforms."""
    dtype = compute_dtype(x)
    A, B = pair(part.product, dtype)
    added = cast(x if x_adapter is None else x_adapter, dtype) @ A @ B.mT
    y = base_in_plain(x, part.weight, part.bias_or_output, dtype)
    return y + cast(added, y.dtype)


def base_in_plain(x: Tensor, weight: Tensor | None, bias_or_output: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The base layer's output [..., out] in `dtype`. Without a weight to read it is the output that
    was given."""
    if weight is None:
        assert bias_or_output is not None
        return bias_or_output
    return F.linear(
        cast(x, dtype), cast(weight, dtype), None if bias_or_output is None else cast(bias_or_output, dtype)
    )
