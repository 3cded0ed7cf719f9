"""Match methods by what they train: set the one setting that sizes a method so that its parameters
come nearest to a budget."""

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, get_args

from svdtune.checkpoint import Checkpoint
from svdtune.errors import SvdtuneError
from svdtune.lab.study.counts import count, largest_rank, opened
from svdtune.lab.study.ranks import Source, section_with_ranks, solve_ranks
from svdtune.training.method import FULL, class_of_method, method_names

# The setting that sizes a method, where it is not `r`.
_KNOBS = {
    "adalora": "init_r",
    "bottleneck": "bottleneck_size",
    "fourierft": "n_frequency",
    "oft": "oft_block_size",
    "tinylora": "u",
    "unilora": "theta_d_length",
    "vblora": "num_vectors",
    "waveft": "n_frequency",
}
# The setting whose multiples alone the knob may be, with its default.
_STEPS = {"gralora": ("gralora_k", 2)}
_BY_SPECTRUM = ("sara", "mosara", "sorsa")
_RATIO = 2
"""lora_alpha / r where a section does not say."""
_ADALORA_KEEPS = 1 / 1.5
"""target_r / init_r where a section does not say."""
RULES = 2
"""Raised when `fit` sizes a method differently than before: kept fits are then made again."""


def fit(
    method: dict[str, Any],
    model: str,
    budget: int | None,
    ranks: Source = "uniform",
    seed: int = 0,
    **origin: Any,
) -> dict[str, Any]:
    """Set a method's size so that what it trains comes nearest to a budget without going over it.

    The setting is `r` for most methods, `threshold` for SARA and Mo-SARA (each method by the other
    of the two where its section gives that), `init_r` for AdaLoRA, the rank with which it starts,
    `num_virtual_tokens` for prefix tuning and its like, the bottleneck's size for adapters.
    AdaLoRA's `target_r` keeps its ratio to `init_r` where the section gives both, and is two thirds
    of it otherwise, rounded (its paper starts with 1.5 times the rank it ends with); so at rank 1
    it gives up none. A method that cannot come near the budget gets the value that comes nearest:
    VeRA, Mo-SARA and their like end at the largest rank that a layer allows, and one whose least
    exceeds the budget gets its least.

    lora_alpha, a whole number, follows the rank (AdaLoRA's `init_r`): a section that gives `r` and
    `lora_alpha` keeps their ratio, one that gives `lora_alpha` alone keeps that number, and one
    that gives none gets 2r. With rslora, whose scale is lora_alpha / √r so that lora_alpha need not
    follow the rank, it stays as it is.

    Ranks by layer are for LoRA (with DoRA, PiSSA and the rest of its class), DyLoRA, SARA, Mo-SARA
    and SORSA: see `svdtune.lab.study.ranks.solve_ranks`. lora_alpha / r is then the same in every
    layer.

    Args:
        method: a recipe's method section: `name` and settings.
        model: as a recipe names it.
        budget: trained parameters. None takes the method as it stands; with ranks by layer, what it
            trains as it stands is the budget.
        ranks: "uniform": as the method sets them; "sara": SARA's; "random": SARA's, shuffled;
            "reverse": SARA's, the largest where the smallest was.
        seed: of the shuffling.
        **origin: `revision` and `trust_remote_code` of a hub model.

    Returns:
        The section, as a recipe takes it.

    Raises:
        SvdtuneError: unknown settings; a budget for a method that no setting sizes; ranks by layer
            for one that has none.
    """
    _check(method, budget, ranks)
    checkpoint = opened(str(model), **origin)
    if ranks != "uniform":
        within = count(checkpoint, method) if budget is None else budget
        found, _ = solve_ranks(checkpoint, method, within, ranks, seed)
        return section_with_ranks(method, found, _ratio(method, sum(found.values()) / len(found)))
    if budget is None:
        return dict(method)
    knob = _knob(method)
    assert knob is not None
    if knob == "threshold":
        _, theta = solve_ranks(checkpoint, method, budget)
        return {key: value for key, value in method.items() if key != "r"} | {"threshold": theta}
    return _sized(method, knob, _search(checkpoint, method, knob, budget))


def _check(method: Mapping[str, Any], budget: int | None, ranks: Source) -> None:
    name = method.get("name")
    if name != FULL and (not isinstance(name, str) or class_of_method(name) is None):
        raise SvdtuneError(f"{name!r} is no method; there are {', '.join(dict.fromkeys(method_names()))}")
    if ranks not in get_args(Source):
        raise SvdtuneError(f"ranks must be {', '.join(map(repr, get_args(Source)))}; got {ranks!r}")
    if budget is not None and (isinstance(budget, bool) or not isinstance(budget, int) or budget < 1):
        raise SvdtuneError(f"a budget is a number of trained parameters of at least 1; got {budget!r}")
    if budget is not None and _knob(method) is None:
        raise SvdtuneError(
            f"no setting of {name} says how many parameters it trains, so it cannot meet a budget of {budget:,}; take it as it "
            "stands, without a budget"
        )


def _knob(method: Mapping[str, Any]) -> str | None:
    """The setting that sizes a method."""
    name = method["name"]
    if name in _BY_SPECTRUM:
        r, threshold = method.get("r") is not None, method.get("threshold") is not None
        return "threshold" if threshold or (name != "sorsa" and not r) else "r"
    known = _settings(name) if name != FULL else set()
    wanted = (_KNOBS.get(name, "r"), "num_virtual_tokens")
    return next((field for field in wanted if field in known), None)


def _settings(name: str) -> set[str]:
    cls = class_of_method(name)
    assert cls is not None  # `_check` has seen to it
    return {field.name for field in fields(cls)}


def _ratio(method: Mapping[str, Any], r: float) -> float | None:
    """lora_alpha / r for a method that has it and shall follow the rank; `r` where the section
    gives lora_alpha alone."""
    known = _settings(method["name"])
    if "lora_alpha" not in known or method.get("use_rslora"):
        return None
    alpha = method.get("lora_alpha")
    return _RATIO if alpha is None else alpha / (method.get(_knob(method) or "") or r)


def _sized(method: Mapping[str, Any], knob: str, value: int) -> dict[str, Any]:
    """The section with its knob at a value, and what follows from that."""
    section = dict(method) | {knob: value}
    ratio = _ratio(method, value)
    if ratio is not None:
        section["lora_alpha"] = max(1, round(ratio * value))
    if knob == "init_r":
        given = method.get("init_r") and method.get("target_r")
        keeps = method["target_r"] / method["init_r"] if given else _ADALORA_KEEPS
        section["target_r"] = max(1, round(value * keeps))
    return section


def _search(checkpoint: Checkpoint, method: Mapping[str, Any], knob: str, budget: int) -> int:
    """The knob's value whose count is the largest that the budget allows, or else the least there
    is.

    By bisection: counts rise with the knob, or fall (RandLoRA, whose `r` is the rank of each of its
    bases). Where they do so with small exceptions (RandLoRA and OFT round to what divides a layer),
    the best of the values that were looked at is taken.
    """
    seen: dict[int, float] = {}

    def cost(value: int) -> float:
        if value not in seen:
            try:
                seen[value] = count(checkpoint, _sized(method, knob, value))
            except SvdtuneError:
                if value == first:
                    raise  # the section is wrong, not the size
                seen[value] = math.inf  # more than a layer allows
        return seen[value]

    step_name, step = _STEPS.get(method["name"], ("", 1))
    step = method.get(step_name, step)
    first = max(step, method.get("r_min", step))  # DyLoRA's lowest rank
    least = cost(first)
    if knob in ("r", "init_r"):
        # A larger rank than this makes no layer's update richer.
        highest = largest_rank(checkpoint, _sized(method, knob, first))
    else:
        highest = 2 * first
        while cost(highest) <= budget and cost(highest) > cost(highest // 2):
            highest *= 2
    values: Sequence[int] = range(first, max(highest, first) + 1, step)
    if cost(values[-1]) < least:
        values = values[::-1]
    bisect_right(values, float(budget), key=cost)
    within = [value for value in seen if seen[value] <= budget]
    return max(within, key=lambda value: (seen[value], -value)) if within else min(seen, key=seen.__getitem__)
