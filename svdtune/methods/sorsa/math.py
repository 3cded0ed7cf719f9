"""SORSA's equations (§3 and Appendix A), as its layer and its regularizer call them.

The paper writes x (W_r + U_p diag(S_p) V_pᵀ) with W [in, out]. Here W is [out, in] and y = x Wᵀ, so
U [out, r] and V [in, r] are the left and right singular vectors of W itself, s [r] its leading
singular values, P₀ = U₀ diag(s₀):

    W_p = U diag(s) Vᵀ                  the principal part, trained                    (Eq. 1)
    W_r = W − P₀ V₀ᵀ                    the residual, frozen; subtracted, so exact     (Eq. 2)
    y = x W_rᵀ + x W_pᵀ                 layout "split": the checkpoint holds W_r       (Eq. 3)
    y = x Wᵀ + x (W_p − P₀ V₀ᵀ)ᵀ        layout "delta": the same function, W untouched
    x W_pᵀ = (x V) (U ⊙ s)ᵀ             never forming W_p                              (Eq. 15)
    L_reg = ‖UᵀU − I‖_F + ‖VᵀV − I‖_F                                                  (Eq. 4)
    ∇_U L_reg = 2 U E / ‖E‖_F, E = UᵀU − I; 0 where E = 0                              (Eq. 5, 6)

Eq. 6 adds (γ / η_d) ∇L_reg to the gradient of the training loss, η_d the largest learning rate of
the schedule.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from svdtune.linalg import Factors
from svdtune.linalg.precision import ieee
from svdtune.methods.compute.gram import gram, of_one_length
from svdtune.methods.compute.lowrank import Product


def principal_part(factors: Factors) -> tuple[Tensor, Tensor]:
    """P₀ = U₀ diag(s₀) [out, r] and V₀ [in, r] of a weight's leading triplets, from which U, s and
    V start."""
    return factors.U * factors.s, factors.Vh.mT.clone(memory_format=torch.contiguous_format)


def sorsa_change(U: Tensor, s: Tensor, V: Tensor, P0: Tensor | None = None, V0: Tensor | None = None) -> Product:
    """What Eq. 3 adds to a weight: W_p − P₀ V₀ᵀ where the weight is W; W_p, without P0 and V0,
    where it is W_r. `low_rank_linear` computes Eq. 3 with it by Eq. 15, `pair` its factors."""
    return Product(U, s, V, P0, V0)


def gram_error(stacked: Tensor, lengths: Sequence[int], of_whole: Tensor | None = None) -> Tensor:
    """E = MᵀM − I [n, r, r] of n factors M [d, r], one below the other in `stacked`. If these are
    only some rows of sharded factors, `of_whole` is the `gram` of the whole ones."""
    E = gram(stacked, lengths) if of_whole is None else of_whole.clone()
    E.diagonal(dim1=-2, dim2=-1).sub_(1)
    return E


def penalty(
    factors: Sequence[Tensor], smooth_eps: float = 0.0, weight: Tensor | float = 1.0, of_whole: Tensor | None = None
) -> tuple[Tensor, Sequence[Tensor]]:
    """‖MᵀM − I‖_F [n] (Eq. 4) of n factors M [d, r] of one rank, and the gradient of each times
    `weight`, [d, r].

    The gradient has norm close to 2 however small the error is, and jumps at 0. `smooth_eps` > 0
    divides by √(‖E‖² + ε²) instead, which is smooth there. Computed in fp32 (fp64 for fp64) with
    autocast and TF32 off. Neighbours of one length share their products; all else is done for all
    factors at once.
    """
    lengths = [len(factor) for factor in factors]
    stacked = torch.cat(list(factors))
    with ieee(stacked.device):
        stacked = stacked if stacked.dtype == torch.float64 else stacked.float()
        E = gram_error(stacked, lengths, of_whole)
        norms = torch.linalg.matrix_norm(E)
        length = norms if smooth_eps == 0 else torch.sqrt(norms.square() + smooth_eps**2)
        E.div_(length.clamp_min(torch.finfo(E.dtype).tiny)[:, None, None])  # 0 / 0 is 0
        slope = torch.mul(E, 2 * weight, out=stacked.new_empty(E.shape))
        gradients = torch.empty_like(stacked)
        parts = zip(of_one_length(stacked, lengths), of_one_length(gradients, lengths), strict=True)
        for (places, M), (_, own) in parts:
            torch.bmm(M, slope[places], out=own)
        return norms.to(stacked.dtype), gradients.split(lengths)
