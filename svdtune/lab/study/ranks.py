"""Ranks by layer for methods that take them: SARA's, from the spectra of the weights, and a control: the same, shuffled."""

import random
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any, Literal

from svdtune import spectra
from svdtune.checkpoint import Checkpoint
from svdtune.errors import SvdtuneError
from svdtune.lab.study.counting import Layer, count, layers
from svdtune.planning import RankTable

Source = Literal["uniform", "sara", "random"]

# Methods whose `rank_pattern` gives layers their ranks. AdaLoRA, OSF and others have a field of that name with another meaning.
WITH_RANKS = ("lora", "dylora", "sara", "mosara", "sorsa")


def solve_ranks(
    checkpoint: Checkpoint, method: Mapping[str, Any], budget: int, source: Source = "sara", seed: int = 0
) -> tuple[dict[str, int], float]:
    """The rank of every adapted layer, and SARA's threshold θ behind them, for the largest θ that a budget allows.

    With "sara" a layer's rank is the least k whose k largest singular values sum to the share θ of all of them (SARA,
    Algorithm 1). θ is solved for with the costs of *this* method, so that SARA's ranks for SORSA come nearest to the budget
    with what a rank costs in SORSA. Where rank 1 everywhere exceeds the budget, that is the answer.

    "random" is the control: SARA's ranks for the budget, permuted among layers of the same shape. A rank costs the same in
    all of these, so the budget is held to the parameter, no rank exceeds what its layer allows, and the histogram of ranks
    is the same: only which layer gets which rank is left to chance, and that is what SARA claims to know. (Drawing ranks
    freely, say from a Dirichlet distribution, would change how unequal the ranks are as well, and a difference in score
    could be due to either.) A layer whose shape no other has keeps SARA's rank.

    Args:
        checkpoint: the model.
        method: a method section; its own `r` and `threshold` do not matter, and layers in its `rank_pattern` keep their ranks.
        budget: trained parameters.
        source: "sara" or "random".
        seed: of the permutation.

    Returns:
        (rank by layer, θ).

    Raises:
        SvdtuneError: the method takes no ranks by layer, or a weight cannot be read.
    """
    table, found, rest = _measured(checkpoint, method)

    def fits(ranks: list[int]) -> bool:
        costs = (layer.fixed + layer.per_rank * rank for layer, rank in zip(found.values(), ranks, strict=True))
        return rest + sum(costs) <= budget

    theta = table.largest_threshold(fits)
    if theta is None:
        theta = table.steps[0] / 2
    ranks = dict(zip(found, table.at(theta), strict=True))
    return (shuffled(ranks, found, seed) if source == "random" else ranks), theta


def ranks_at(checkpoint: Checkpoint, method: Mapping[str, Any], threshold: float) -> dict[str, int]:
    """SARA's rank of every adapted layer at a threshold."""
    table, found, _ = _measured(checkpoint, method)
    return dict(zip(found, table.at(threshold), strict=True))


def shuffled(ranks: Mapping[str, int], layers: Mapping[str, Layer], seed: int) -> dict[str, int]:
    """The ranks, permuted among layers of one shape and cost."""
    groups: dict[tuple[int, ...], list[str]] = {}
    for name, layer in layers.items():
        groups.setdefault((layer.out_features, layer.in_features, layer.fixed, layer.per_rank), []).append(name)
    generator = random.Random(seed)  # noqa: S311
    drawn = {}
    for names in groups.values():
        order = [ranks[name] for name in names]
        generator.shuffle(order)
        drawn |= zip(names, order, strict=True)
    return {name: drawn[name] for name in ranks}


def pattern(ranks: Mapping[str, int]) -> dict[str, int]:
    """PEFT's `rank_pattern`: an anchored expression for each layer's whole name → its rank."""
    return {f"^{re.escape(name)}": rank for name, rank in ranks.items()}


def with_ranks(method: Mapping[str, Any], ranks: Mapping[str, int], scale: float | None = None) -> dict[str, Any]:
    """The section with these ranks, where it has none of its own, in place of `r` and `threshold`.

    Args:
        method: the section.
        ranks: by layer.
        scale: lora_alpha / r, the same in every layer; None for methods without it, or that shall keep their lora_alpha.
    """
    section = {key: value for key, value in method.items() if key not in ("r", "threshold", "rank_pattern")}
    own = method.get("rank_pattern") or {}
    section |= {"r": Counter(ranks.values()).most_common(1)[0][0], "rank_pattern": own | pattern(ranks)}
    if scale is not None:
        section["lora_alpha"] = max(1, round(scale * section["r"]))
        section["alpha_pattern"] = {name: _whole(scale * rank) for name, rank in section["rank_pattern"].items()}
    return section


def _whole(number: float) -> float | int:
    """The number as an int, where it is one."""
    return int(number) if number == int(number) else number


def _measured(checkpoint: Checkpoint, method: Mapping[str, Any]) -> tuple[RankTable, dict[str, Layer], int]:
    """Spectra and costs of every adapted layer, and what the method trains elsewhere."""
    if method["name"] not in WITH_RANKS:
        raise SvdtuneError(f"{method['name']} takes no ranks by layer; those that do are {', '.join(WITH_RANKS)}")
    found = layers(checkpoint, method)
    weights = {name: layer.weight for name, layer in found.items()}
    table = RankTable(dict(spectra.spectra(weights)))
    settings = {key: value for key, value in method.items() if key != "threshold"}
    rest = count(checkpoint, settings | {"r": 1}) - sum(layer.fixed + layer.per_rank for layer in found.values())
    return table, found, rest
