"""SARA's equations (Gu et al., 2024, §4.2), as its layer calls them.

The paper writes h = x (W₀ + U Λ V) with W₀ [in, out]. Here W is [out, in] and y = x Wᵀ, so the
paper's U [in, k] is V, and its V [k, out] is Uᵀ:

    y = x Wᵀ + x V diag(λ) Uᵀ          U [out, k], λ [k], V [in, k], all trained           (Eq. 3)
    ΔW = U diag(λ) Vᵀ                                                                       (Eq. 4)

k is the rank at a threshold of W's spectrum (Algorithm 1: `svdtune.linalg.rank_at_threshold`). The
SVD sets k alone; the factors start random and nothing is subtracted from W.
"""

import math

import torch
from torch import Tensor

from svdtune.methods.compute.lowrank import Product


def sara_change(U: Tensor, lam: Tensor | None, V: Tensor) -> Product:
    """Eq. 4: ΔW = U diag(λ) Vᵀ; λ is None for the ablation without it. `low_rank_linear` computes
    Eq. 3 with it, `pair` its factors."""
    return Product(U, lam, V)


def kaiming_factors(out_features: int, in_features: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The paper's random start: Kaiming uniform with a = √5 (Appendix A), that is uniform in
    ±1/√fan_in.

    U [out, k], λ [k] and V [in, k], in fp32. The fan-in is what each factor multiplies: V reads x
    (in), U reads the k projections, and λ is a 1×k tensor, so ±1/√k.
    """

    def uniform(shape: tuple[int, ...], fan_in: int) -> Tensor:
        bound = 1 / math.sqrt(fan_in)
        return torch.empty(shape).uniform_(-bound, bound)

    return uniform((out_features, k), k), uniform((k,), k), uniform((in_features, k), in_features)
