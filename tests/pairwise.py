"""Combinations for a grid of tests: every pair of values of two factors is in one, in far fewer
than the full product has.

A fault that shows only where three factors meet is rare, and the product of three grows with each
value; see Kuhn, Wallace and Gallo (2004), "Software Fault Interactions and Implications for
Software Testing".
"""

from collections.abc import Iterable, Sequence
from itertools import combinations, product
from typing import Any


def all_pairs(*factors: Iterable[Any]) -> list[tuple[Any, ...]]:
    """Combinations of one value of each factor that hold every pair of values of any two factors,
    in the product's order.

    They are chosen greedily, so the same ones each time: from the product, always the first that
    holds most of the pairs that none before it held.

    Args:
        factors: The values of each, of which the product is small enough to list.
    """
    values = [list(factor) for factor in factors]
    grid = list(product(*(range(len(each)) for each in values)))
    missing = set().union(*map(_pairs, grid))
    chosen = set()
    while missing:
        best = max(grid, key=lambda places: len(_pairs(places) & missing))
        chosen.add(best)
        missing -= _pairs(best)
    return [tuple(each[place] for each, place in zip(values, places, strict=True)) for places in sorted(chosen)]


def shared_out(tests: Iterable[str], *factors: Iterable[Any]) -> dict[str, list[tuple[Any, ...]]]:
    """The combinations for each of several tests over one grid, the test itself being a factor."""
    shares: dict[str, list[tuple[Any, ...]]] = {test: [] for test in tests}
    for test, *values in all_pairs(shares, *factors):
        shares[test].append(tuple(values))
    return shares


def _pairs(places: Sequence[int]) -> set[tuple[tuple[int, int], ...]]:
    return set(combinations(enumerate(places), min(2, len(places))))
