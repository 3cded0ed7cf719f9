"""The kernels' public functions: a direct launch in eager mode, one opaque operator each under
`torch.compile`.

An operator's own overhead is several times a launch's, which small models feel; a compiled graph
does not pay it in Python.
"""

import importlib.util

import torch
from torch import Tensor
from torch.library import custom_op

from svdtune.methods.compute.transforms import under_transform

HAS_TRITON = importlib.util.find_spec("triton") is not None
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def available(*tensors: Tensor | None) -> bool:
    """Whether the kernels can take these tensors: Triton installed, all on an NVIDIA GPU, none
    wider than fp32, no transform of torch.func at work."""
    return (
        HAS_TRITON
        and torch.version.hip is None
        and not under_transform()
        and all(t is None or (t.is_cuda and t.dtype in DTYPES) for t in tensors)
    )


def stack_factors(
    U: Tensor, s: Tensor | None, V: Tensor, P0: Tensor | None, V0: Tensor | None, dtype: torch.dtype, pad: int = 8
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
    if torch.compiler.is_compiling():
        return _stack_factors(U, s, V, P0, V0, dtype, pad)
    from svdtune.methods.compute.kernels import factors

    return factors.stack_factors(U, s, V, P0, V0, dtype, pad)


def dropout_mm(x: Tensor, A: Tensor, p: float, seed: Tensor | None) -> Tensor:
    """z = (keep ∘ x) A / (1 − p), with keep = `dropout_mask(x.shape, p, seed)`.

    Args:
        x: [T, d]; rows may lie apart.
        A: [d, w], the dtype of x.
        p: 0 ≤ p < 1.
        seed: See `dropout_seed`; on the device of x. None will do where p = 0, here and in the two
            functions below.

    Returns:
        [T, w] in the dtype of x.
    """
    if torch.compiler.is_compiling():
        return _dropout_mm(x, A, p, seed)
    from svdtune.methods.compute.kernels import dropout

    return dropout.dropout_mm(x, A, p, seed)


def dropout_mm_transposed(x: Tensor, Q: Tensor, p: float, seed: Tensor | None) -> Tensor:
    """(keep ∘ x)ᵀ Q / (1 − p), [d, w] in fp32, for x [T, d] and Q [T, w] of one dtype; p = 0 is a
    plain split product."""
    if torch.compiler.is_compiling():
        return _dropout_mm_transposed(x, Q, p, seed)
    from svdtune.methods.compute.kernels import dropout

    return dropout.dropout_mm_transposed(x, Q, p, seed)


def add_dropout_mm_(dx: Tensor, Q: Tensor, A: Tensor, p: float, seed: Tensor | None) -> Tensor:
    """dx += keep ∘ (Q Aᵀ) / (1 − p), in place, for dx [T, d], Q [T, w] and A [d, w]; added in fp32,
    rounded once."""
    if torch.compiler.is_compiling():
        _add_dropout_mm_(dx, Q, A, p, seed)
        return dx
    from svdtune.methods.compute.kernels import dropout

    dropout.add_dropout_mm_(dx, Q, A, p, seed)
    return dx


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
    if torch.compiler.is_compiling():
        return _mix(z, w1, w2, lam)
    from svdtune.methods.compute.kernels import router

    return router.mix(z, w1, w2, lam)


def mix_backward(
    dt: Tensor, z: Tensor, gate: Tensor, a: Tensor, lam: Tensor, w1: Tensor, w2: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `mix` from dt [T, width] and what it returned; dt and z are read twice, the
    second time for the sums.

    Returns:
        dz [T, width] in the dtype of z, zero from column k on; dλ, dw₁ and dw₂ in the dtypes and
        shapes of λ, w₁ and w₂.
    """
    if torch.compiler.is_compiling():
        return _mix_backward(dt, z, gate, a, lam, w1, w2)
    from svdtune.methods.compute.kernels import router

    return router.mix_backward(dt, z, gate, a, lam, w1, w2)


@custom_op("svdtune::stack_factors", mutates_args=())
def _stack_factors(
    U: Tensor, s: Tensor | None, V: Tensor, P0: Tensor | None, V0: Tensor | None, dtype: torch.dtype, pad: int
) -> tuple[Tensor, Tensor]:
    from svdtune.methods.compute.kernels import factors

    return factors.stack_factors(U, s, V, P0, V0, dtype, pad)


@_stack_factors.register_fake
def _(
    U: Tensor, s: Tensor | None, V: Tensor, P0: Tensor | None, V0: Tensor | None, dtype: torch.dtype, pad: int
) -> tuple[Tensor, Tensor]:
    width = -(-(U.shape[1] if P0 is None else 2 * U.shape[1]) // pad) * pad
    return V.new_empty(V.shape[0], width, dtype=dtype), U.new_empty(U.shape[0], width, dtype=dtype)


@custom_op("svdtune::dropout_mm", mutates_args=())
def _dropout_mm(x: Tensor, A: Tensor, p: float, seed: Tensor | None) -> Tensor:
    from svdtune.methods.compute.kernels import dropout

    return dropout.dropout_mm(x, A, p, seed)


@_dropout_mm.register_fake
def _(x: Tensor, A: Tensor, p: float, seed: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], A.shape[1])


@custom_op("svdtune::dropout_mm_transposed", mutates_args=())
def _dropout_mm_transposed(x: Tensor, Q: Tensor, p: float, seed: Tensor | None) -> Tensor:
    from svdtune.methods.compute.kernels import dropout

    return dropout.dropout_mm_transposed(x, Q, p, seed)


@_dropout_mm_transposed.register_fake
def _(x: Tensor, Q: Tensor, p: float, seed: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[1], Q.shape[1], dtype=torch.float32)


@custom_op("svdtune::add_dropout_mm_", mutates_args={"dx"})
def _add_dropout_mm_(dx: Tensor, Q: Tensor, A: Tensor, p: float, seed: Tensor | None) -> None:
    from svdtune.methods.compute.kernels import dropout

    dropout.add_dropout_mm_(dx, Q, A, p, seed)


@_add_dropout_mm_.register_fake
def _(dx: Tensor, Q: Tensor, A: Tensor, p: float, seed: Tensor | None) -> None:
    return None


@custom_op("svdtune::mix", mutates_args=())
def _mix(z: Tensor, w1: Tensor, w2: Tensor, lam: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    from svdtune.methods.compute.kernels import router

    return router.mix(z, w1, w2, lam)


@_mix.register_fake
def _(z: Tensor, w1: Tensor, w2: Tensor, lam: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows = z.shape[0]
    gate, a = z.new_empty(rows, lam.shape[0], dtype=torch.float32), z.new_empty(rows, dtype=torch.float32)
    return z.new_empty(z.shape), gate, a


@custom_op("svdtune::mix_backward", mutates_args=())
def _mix_backward(
    dt: Tensor, z: Tensor, gate: Tensor, a: Tensor, lam: Tensor, w1: Tensor, w2: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from svdtune.methods.compute.kernels import router

    return router.mix_backward(dt, z, gate, a, lam, w1, w2)


@_mix_backward.register_fake
def _(
    dt: Tensor, z: Tensor, gate: Tensor, a: Tensor, lam: Tensor, w1: Tensor, w2: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return z.new_empty(z.shape), lam.new_empty(lam.shape), w1.new_empty(w1.shape), w2.new_empty(w2.shape)
