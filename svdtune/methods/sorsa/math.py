"""SORSA's equations (§3 and Appendix A), fast.

The paper writes x (W_r + U_p diag(S_p) V_pᵀ) with W [in, out]. Here W is [out, in] and y = x Wᵀ, so U [out, r] and V [in, r]
are the left and right singular vectors of W itself, s [r] its leading singular values, P₀ = U₀ diag(s₀):

    W_p = U diag(s) Vᵀ                    the principal part, trained                                            (Eq. 1)
    W_r = W − P₀ V₀ᵀ                      the residual, frozen; by subtraction, so the split is exact            (Eq. 2)
    y = x W_rᵀ + x W_pᵀ                   layout "residual": W_r takes W's place                                  (Eq. 3)
    y = x Wᵀ + x (U diag(s) Vᵀ − P₀ V₀ᵀ)ᵀ layout "delta": the same function, W untouched
    x W_pᵀ = (x V) (U ⊙ s)ᵀ               never forming W_p                                                      (Eq. 15)
    L_reg = ‖UᵀU − I‖_F + ‖VᵀV − I‖_F                                                                             (Eq. 4)
    ∇_U L_reg = 2 U E / ‖E‖_F, E = UᵀU − I, and 0 where E = 0                                                     (for Eq. 5, 6)

Eq. 6 adds (γ / η_d) ∇L_reg to the gradient of the training loss, η_d the largest learning rate of the schedule.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from svdtune.methods.compute.lowrank import low_rank_linear, pair


def sorsa_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    U: Tensor,
    s: Tensor,
    V: Tensor,
    P0: Tensor | None = None,
    V0: Tensor | None = None,
    x_adapter: Tensor | None = None,
    p: float = 0.0,
) -> Tensor:
    """Eq. 3: x [..., in] → [..., out]. With P0 and V0 `weight` is W (delta), without them it is W_r (residual)."""
    return low_rank_linear(x, weight, bias, U, s, V, P0, V0, x_adapter, p)


def sorsa_delta(U: Tensor, s: Tensor, V: Tensor, P0: Tensor, V0: Tensor) -> Tensor:
    """W_p − P₀ V₀ᵀ [out, in], as a sum of two small terms rather than a difference of two large ones."""
    A, B = sorsa_pair(U, s, V, P0, V0)
    return B @ A.mT


def sorsa_pair(
    U: Tensor, s: Tensor, V: Tensor, P0: Tensor | None = None, V0: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """A = [V, V − V₀] [in, 2r] and B = [P − P₀, P₀] [out, 2r], P = U diag(s): B Aᵀ = P Vᵀ − P₀ V₀ᵀ."""
    return pair(U, s, V, P0, V0)  # trained factors kept in bf16 are widened to the frozen ones' dtype


def gram(factors: Tensor) -> Tensor:
    """MᵀM [n, r, r] of factors [n, d, r], long dimension first, in fp64 wherever the device has it.

    Straight after an SVD MᵀM − I is of the size of fp32's rounding. In fp64 it, and with it the direction of the penalty's
    gradient, follows from the factors alone, not from the order of a sum: sharded factors give what whole ones give.
    """
    factors = factors.float() if factors.device.type == "mps" else factors.double()
    with torch.autocast(factors.device.type, enabled=False):
        return factors.mT @ factors


def gram_error(factors: Tensor, of_whole: Tensor | None = None) -> Tensor:
    """E = MᵀM − I [n, r, r] of factors [n, d, r]; where these are some rows of sharded ones, `of_whole` is `gram` of all."""
    E = gram(factors) if of_whole is None else of_whole.clone()
    E.diagonal(dim1=-2, dim2=-1).sub_(1)
    return E


def penalty(
    factors: Tensor, smooth_eps: float = 0.0, weight: Tensor | float = 1.0, of_whole: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """‖MᵀM − I‖_F and its gradient, times `weight`, for factors [n, d, r], long dimension first: [n] and [n, d, r].

    The gradient has norm close to 2 however small the error is, and jumps at 0. `smooth_eps` > 0 divides by
    √(‖E‖² + ε²) instead, which is smooth there. Computed in fp32 (fp64 for fp64) with autocast and TF32 off.
    Where `factors` are some rows of sharded ones, `of_whole` is `gram` of all their rows.
    """
    with torch.autocast(factors.device.type, enabled=False), _full_fp32_matmul():
        factors = factors if factors.dtype == torch.float64 else factors.float()
        E = gram_error(factors, of_whole)
        norms = torch.linalg.matrix_norm(E)
        length = norms if smooth_eps == 0 else torch.sqrt(norms.square() + smooth_eps**2)
        slope = torch.where(length > 0, 2 / length, 0) * weight
        return norms.to(factors.dtype), torch.bmm(factors, (E * slope[:, None, None]).to(factors.dtype))


@contextmanager
def _full_fp32_matmul() -> Iterator[None]:
    """Keep TF32 and bf16 out of the fp32 products of a block, whatever the user allowed elsewhere."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def trainable_parameters(r: int, in_features: int, out_features: int) -> int:
    """Parameters trained in one layer: r (in + out + 1)."""
    return r * (in_features + out_features + 1)
