"""Ranks by layer for methods that take them: SARA's, from the spectra of the weights, and two
controls: the same, shuffled, and dealt out the other way round."""

import random
from collections.abc import Callable, Mapping
from typing import Any, Literal

from svdtune.checkpoint import Checkpoint
from svdtune.lab.study.counts import config_of
from svdtune.methods.ranks import common_rank, rank_pattern
from svdtune.planning import Costs

Source = Literal["uniform", "sara", "random", "reverse"]


def solve_ranks(
    checkpoint: Checkpoint, method: Mapping[str, Any], budget: int, source: Source = "sara", seed: int = 0
) -> tuple[dict[str, int], float]:
    """The rank of every adapted layer, and SARA's threshold θ behind them, for the largest θ that a
    budget allows.

    With "sara" a layer's rank is the least k whose k largest singular values sum to the share θ of
    all of them (SARA, Algorithm 1). θ is solved for with the costs of *this* method, so that SARA's
    ranks for SORSA come nearest to the budget with what a rank costs in SORSA. Where rank 1
    everywhere exceeds the budget, that is the answer.

    "random" is the control: SARA's ranks for the budget, permuted among layers of the same shape. A
    rank costs the same in all of these, so the budget is held to the parameter, no rank exceeds
    what its layer allows, and the histogram of ranks is the same: only which layer gets which rank
    is left to chance, and that is what SARA claims to know. (Drawing ranks freely, say from a
    Dirichlet distribution, would change how unequal the ranks are as well, and a difference in
    score could be due to either.) A layer whose shape no other has keeps SARA's rank.

    "reverse" is the opposite of SARA's claim: among layers of the same shape, the one with SARA's
    largest rank gets the smallest, and so on.

    Args:
        checkpoint: the model.
        method: a method section; its own `r` and `threshold` do not matter, and layers in its
            `rank_pattern` keep their ranks.
        budget: trained parameters.
        source: "sara", "random" or "reverse".
        seed: of the permutation.

    Returns:
        (rank by layer, θ).

    Raises:
        SvdtuneError: the method takes no ranks by layer, or a weight cannot be read.
    """
    costs = Costs(checkpoint, config_of(checkpoint, method))
    table = costs.table(checkpoint)
    theta = table.largest_threshold(lambda ranks: costs.at(ranks).trained <= budget)
    if theta is None:
        theta = table.steps[0] / 2
    ranks = dict(zip(costs.per_rank, table.at(theta), strict=True))
    if source == "random":
        ranks = dealt(ranks, costs, shuffle_by(seed))
    return (dealt(ranks, costs, reverse) if source == "reverse" else ranks), theta


def dealt(ranks: Mapping[str, int], costs: Costs, deal: Callable[[list[int]], list[int]]) -> dict[str, int]:
    """The ranks, dealt out anew among layers of one shape and cost; `deal` permutes those of one
    group."""
    groups: dict[tuple[Any, ...], list[str]] = {}
    for site in costs.least:
        groups.setdefault((site.shape, site.trained, costs.per_rank[site.name]), []).append(site.name)
    drawn: dict[str, int] = {}
    for names in groups.values():
        drawn |= zip(names, deal([ranks[name] for name in names]), strict=True)
    return {name: drawn[name] for name in ranks}


def shuffle_by(seed: int) -> Callable[[list[int]], list[int]]:
    """A permutation of each group it is given, all drawn from one seed."""
    generator = random.Random(seed)  # noqa: S311

    def shuffle(ranks: list[int]) -> list[int]:
        drawn = list(ranks)
        generator.shuffle(drawn)
        return drawn

    return shuffle


def reverse(ranks: list[int]) -> list[int]:
    """The smallest rank where the largest was, and so on."""
    order = sorted(range(len(ranks)), key=lambda at: (ranks[at], at))
    mirrored = dict(zip(order, reversed(order), strict=True))
    return [ranks[mirrored[at]] for at in range(len(ranks))]


def section_with_ranks(
    method: Mapping[str, Any], ranks: Mapping[str, int], scale: float | None = None
) -> dict[str, Any]:
    """The section with these ranks, where it has none of its own, in place of `r` and `threshold`.

    Args:
        method: the section.
        ranks: by layer.
        scale: lora_alpha / r, the same in every layer; None for methods without it, or that shall
            keep their lora_alpha.
    """
    section = {key: value for key, value in method.items() if key not in ("r", "threshold", "rank_pattern")}
    own = method.get("rank_pattern") or {}
    section |= {"r": common_rank(ranks), "rank_pattern": own | rank_pattern(ranks)}
    if scale is not None:
        section["lora_alpha"] = max(1, round(scale * section["r"]))
        section["alpha_pattern"] = {name: _whole(scale * rank) for name, rank in section["rank_pattern"].items()}
    return section


def _whole(number: float) -> float | int:
    """The number as an int, where it is one."""
    return int(number) if number == int(number) else number
