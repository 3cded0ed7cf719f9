"""Ranks as a PEFT configuration gives them: `r` for every layer, and `rank_pattern` for single
ones."""

import dataclasses
import re
from collections import Counter
from collections.abc import Mapping
from functools import cache
from typing import Any, TypeVar

from peft import PeftConfig

Config = TypeVar("Config", bound=PeftConfig)
Number = TypeVar("Number", int, float)


def given_rank(config: PeftConfig, *names: str) -> int | None:
    """The rank that a configuration gives a layer: what `rank_pattern` has for the first of its
    names that it knows, else `r`.

    None if the configuration has a threshold instead.
    """
    found = pattern_rank(config, *names)
    with_r: Any = config
    return with_r.r if found is None else found


def pattern_rank(config: PeftConfig, *names: str) -> int | None:
    """The rank that `rank_pattern` has for the first of a layer's names that it knows; None if it
    knows none."""
    patterns: Mapping[str, int] = getattr(config, "rank_pattern", None) or {}
    matched = (next((rank for key, rank in patterns.items() if _expression(key).match(name)), None) for name in names)
    return next((rank for rank in matched if rank is not None), None)


@cache
def _expression(key: str) -> re.Pattern[str]:
    """A key of `rank_pattern` as PEFT's `get_pattern_key` reads it.

    Kept compiled: `re` itself remembers 512 expressions, and a large model has more layers than
    that.
    """
    return re.compile(rf"(.*\.)?({key})$")


def rank_pattern(ranks: Mapping[str, Number]) -> dict[str, Number]:
    """PEFT's `rank_pattern` for ranks by layer: an anchored expression for each layer's whole name
    → its rank.

    The anchor keeps `layers.0.q` from matching `vision.layers.0.q` too.
    """
    return {f"^{re.escape(name)}": rank for name, rank in ranks.items()}


def common_rank(ranks: Mapping[str, int]) -> int:
    """The rank that most layers have, which is what `r` says beside a `rank_pattern`."""
    return Counter(ranks.values()).most_common(1)[0][0]


def with_rank(config: Config, r: int, **changes: Any) -> Config:
    """The configuration with one rank and no threshold. Layers in its `rank_pattern` keep their
    ranks."""
    if hasattr(config, "threshold"):
        changes["threshold"] = None
    changes["r"] = r
    return dataclasses.replace(config, **changes)


def with_ranks(config: Config, ranks: Mapping[str, int]) -> Config:
    """The configuration with these ranks by layer. Layers in its own `rank_pattern` keep theirs."""
    pattern = (getattr(config, "rank_pattern", None) or {}) | rank_pattern(ranks)
    return with_rank(config, common_rank(ranks), rank_pattern=pattern)
