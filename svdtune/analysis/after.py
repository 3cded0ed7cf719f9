"""After training: what changed in each layer, how large it is, and how it lies in the base weight's
own singular directions."""

from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from svdtune.analysis.weights import Opened
from svdtune.linalg import Factors, spectrum
from svdtune.linalg.deviation import compared_factors, product_values
from svdtune.methods.layers.base import SvdLayer
from svdtune.methods.layers.matrices import Observed
from svdtune.spectra import base_weight
from svdtune.system import without_bar
from svdtune.training.movement import moved, side_by_side

# So many leading singular values of a change are kept.
KEPT = 32


def after(run: Opened, progress: bool | None = None, k: int | None = None) -> dict[str, Any]:
    """Compare every layer whose change is a matrix with the base model's own weight.

    Args:
        run: the finished run.
        progress: show a bar; None: where it takes long.
        k: compare a sample of so many leading singular triplets; by default all of them.

    Returns:
        {"layers": {name: {…}}} with what `svdtune.training.movement.Movement` holds, and
        "delta": {"values", "sum", "stable_rank", "effective_rank"} of ΔW (its leading singular
        values, their whole sum, ‖ΔW‖_F² / σ₁², and exp of the entropy of σ / Σσ), and
        "energy": {"count", "left", "right"}, the shares of ‖ΔW‖_F² within the base's `count`
        leading left and right singular directions. A change without preference has count / out and
        count / in there.
    """
    with tqdm(
        total=len(run.matrices), desc="svdtune changes", unit="layer", delay=1.0, disable=without_bar(progress)
    ) as bar:

        def compared(layer: Observed) -> dict[str, Any]:
            found = _compared(run, layer, k)
            bar.update()
            return found

        return {"layers": side_by_side(compared, run.matrices)}


@torch.no_grad()
def _compared(run: Opened, layer: Observed, k: int | None) -> dict[str, Any]:
    base, weight = run.start(layer), layer.weight()
    start = compared_factors(base, k)
    delta, values = _delta(layer, base, weight, float(start.s[0]))
    change = float(values.square().sum().sqrt())
    return {
        "out": base.shape[0],
        "in": base.shape[1],
        **moved(layer, start, weight, change, float(base.norm())),
        "delta": spectrum_of_change(values),
        "energy": energy(delta, start) if change else None,
    }


def _delta(layer: Observed, base: Tensor, weight: Tensor, largest: float) -> tuple[Tensor, Tensor]:
    """ΔW [out, in] and its singular values, float64; from thin factors where they are what was
    added to `base`.

    `largest` is the base weight's first singular value.
    """
    pair = layer.added_pair()
    if pair is not None and (
        isinstance(layer.module, SvdLayer) or torch.equal(base_weight(layer.module).to(base), base)
    ):
        A, B = pair
        return (B @ A.mT).to(base), product_values(A, B)
    delta = weight - base
    values = spectrum(delta).values
    # What is left where two weights in fp32 cancel is their rounding, not a change.
    rounding = 4 * torch.finfo(torch.float32).eps * largest
    return delta, torch.where(values > rounding, values, 0.0)


def spectrum_of_change(values: Tensor) -> dict[str, Any]:
    """The leading singular values of a change and two measures of how many matter, from all of
    them, descending."""
    total = float(values.sum())
    if total == 0:
        return {"values": [], "sum": 0.0, "stable_rank": 0.0, "effective_rank": 0.0}
    shares = values[values > 0] / total
    return {
        "values": [float(f"{value:.6g}") for value in values[:KEPT].tolist() if value > 0],
        "sum": total,
        "stable_rank": float(values.square().sum() / values[0] ** 2),
        "effective_rank": float(torch.exp(-(shares * shares.log()).sum())),
    }


def energy(delta: Tensor, base: Factors) -> dict[str, list[float]]:
    """Shares of ‖ΔW‖_F² in the spans of the base's leading 1, 2, 4, … left and right singular
    directions.

    Args:
        delta: ΔW [out, in], not zero.
        base: the base weight's triplets.
    """
    delta = delta.cpu().double()
    whole = delta.square().sum()
    left = (base.U.double().mT @ delta).square().sum(1).cumsum(0) / whole
    right = (delta @ base.Vh.double().mT).square().sum(0).cumsum(0) / whole
    k = len(base.s)
    counts = sorted({2**i for i in range(k.bit_length()) if 2**i <= k} | {k})
    return {
        "count": counts,
        "left": [round(float(left[count - 1]), 6) for count in counts],
        "right": [round(float(right[count - 1]), 6) for count in counts],
    }
