"""The pairs A [r, in], B [out, r] that LoRA starts from, as PEFT's `tuners/lora/layer.py` has them.

LoRA adds c · B A to the weight, c = alpha / r (or alpha / √r). A start that is not zero is taken
off the weight, so that the model begins as it was: W ← W − c · B A.

    pissa   B = U √(S/c), A = √(S/c) Vᵀ of the r first triplets  Meng et al., arXiv:2404.02948
            of the r last ones: MiLoRA                           Wang et al., arXiv:2406.09044
    olora   B = Q_r, A = R_r of W = Q R                          Büyükakyüz, arXiv:2406.01775
    corda   as pissa, of the triplets of W C with Vᵀ C⁻¹         Yang et al., arXiv:2406.05223
    mica    B = U of the r last triplets, A = 0                  arXiv:2604.01694
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftConfig
from torch import Tensor

from svdtune.errors import SvdtuneError
from svdtune.linalg import Components, Factors, band_factors, band_of, check_inside
from svdtune.linalg.matrix import check_rank, largest_entry
from svdtune.linalg.precision import full_precision

PISSA = re.compile(r"pissa(_niter_\d+)?")
# Starts that are taken off the base's weights, by how their names begin.
_TAKEN_OFF = ("pissa", "olora", "corda", "loftq", "lora_ga")
# Of a saved adapter PEFT takes these off again on loading, so it belongs on the model from before.
# Others follow from data or chance that are gone by then.
_REPEATED = ("pissa", "olora", "loftq")


def start_of(config: PeftConfig) -> str:
    """A LoRA's `init_lora_weights` in small letters, as "pissa" or "true"; "none" of others."""
    return str(getattr(config, "init_lora_weights", None)).lower()


def is_taken_off(config: PeftConfig) -> bool:
    """Whether a saved adapter's start was taken off its base's weights, so that its B A alone is no
    change of the model from before."""
    return start_of(config).startswith(_TAKEN_OFF)


def is_repeated(config: PeftConfig) -> bool:
    """Whether PEFT takes off the same start again when it loads an adapter whose start was."""
    return start_of(config) in _REPEATED


def check_repeated(folder: Path, config: PeftConfig) -> None:
    """Raise `SvdtuneError` for a saved adapter whose start PEFT does not find again on loading, so
    that its outputs would be others."""
    if is_taken_off(config) and not is_repeated(config):
        init = getattr(config, "init_lora_weights", None)
        unprepared = "; if preprocess_loraga never ran, only that setting is to be changed to true" * (
            init == "lora_ga"
        )
        raise SvdtuneError(
            f"the adapter {folder} was started by init_lora_weights={init!r} and its start was taken off the base's weights; "
            "PEFT does not find the same start again on loading, so the outputs would be others. Write what was left of "
            'the base, model.unload().save_pretrained("residual"), set init_lora_weights to true in adapter_config.json, and '
            "name that base; or take off the adapter as it was before training, which gives a LoRA for the base itself: "
            f"`svdtune export {folder} --start BEFORE --output FOLDER`{unprepared}"
        )


def written_start(init: Any, components: Components) -> Any:
    """The `init_lora_weights` that the saved configuration of an adapter started here has: exact is
    "pissa", and of other triplets a name that PEFT refuses to load, since it would take the first
    ones off the weights."""
    if not isinstance(init, str) or not PISSA.fullmatch(init):
        return init
    if components == "first":
        return "pissa"
    return "_".join(["pissa", *([components] if isinstance(components, str) else map(str, components))])


def check_not_asked(components: Components, init: Any) -> None:
    """Raise `SvdtuneError` where triplets are asked for with a start that has its own."""
    if components != "first":
        raise SvdtuneError(f"components says which triplets PiSSA starts from, and {init!r} has its own; leave it out")


def check_pissa(components: Components, r: int, scaling: float, shape: Sequence[int]) -> None:
    """Raise `SvdtuneError` where PiSSA cannot start a layer of a weight [out, in] from r triplets.

    Raises:
        SvdtuneError: its spectrum lacks them, or the scale has no square root.
    """
    if not scaling > 0:
        raise SvdtuneError(
            f"PiSSA divides singular values by LoRA's scale and takes their roots, and here it is {scaling:g}; give a "
            "lora_alpha above 0"
        )
    check_inside(*band_of(components, r, min(shape)), shape)


class LoraPair(NamedTuple):
    """lora_A [r, in] and lora_B [out, r] in fp32."""

    A: Tensor
    B: Tensor


def from_factors(factors: Factors, scaling: float) -> LoraPair:
    """PiSSA's pair from singular triplets: scaling · B A = U diag(s) Vᵀ, evenly split."""
    root = (factors.s / scaling).sqrt()
    return LoraPair(root[:, None] * factors.Vh, factors.U * root)


def from_qr(weight: Tensor, r: int) -> LoraPair:
    """OLoRA's pair of a weight [out, in]: the r first columns of Q and rows of R.

    Householder's columns of Q follow from as many columns of the weight alone, so the others are
    never factorised: R_r = Q_rᵀ W.

    Raises:
        SvdtuneError: r outside 1 … min(out, in), or `weight` is not a finite matrix.
    """
    largest_entry(weight)
    check_rank(r, weight.shape)
    with full_precision(weight.device):
        wide = weight.detach().float()
        Q, R = torch.linalg.qr(wide[:, :r])
        return LoraPair(torch.cat([R, Q.mT @ wide[:, r:]], 1), Q)


def from_last_left(weight: Tensor, r: int) -> LoraPair:
    """MiCA's pair of a weight [out, in]: the left vectors of its r least singular values, and zero.

    Raises:
        SvdtuneError: r outside 1 … min(out, in), or `weight` is not a finite matrix.
    """
    check_rank(r, weight.shape)
    n = min(weight.shape)
    U = band_factors(weight, n - r, n).U
    return LoraPair(U.new_zeros(r, weight.shape[1]), U)


def damped_covariance(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """CorDA's C [in, in] of a layer's inputs and C⁻¹, in fp32: its diagonal is raised by a share of
    its mean that is doubled until the inverse is one, as `peft.tuners.lora.corda` does."""
    covariance = covariance.float()
    eye = torch.eye(len(covariance), device=covariance.device)
    damp = 0.01
    while True:
        damped = covariance + eye * covariance.diagonal().mean() * damp
        inverse = torch.linalg.inv(damped)
        # of what is not finite PEFT would never come to an end
        if not float(torch.dist(damped @ inverse, eye)) >= 0.05:
            return damped, inverse
        damp *= 2


def residual(weight: Tensor, pair: LoraPair, scaling: float) -> Tensor:
    """W − scaling · B A in the weight's dtype, subtracted in fp32."""
    with full_precision(weight.device):
        return torch.addmm(weight.detach().float(), pair.B, pair.A, alpha=-scaling).to(weight.dtype)
