"""The combinations of a grid that tests run instead of all."""

from itertools import combinations, product

import pytest
from pairwise import pairwise

GRIDS = [("ab", "cde", "fg"), (range(4), range(6), range(3)), (range(4), "ab", "cd", "ef"), (range(10), "ab", "cd")]


@pytest.mark.parametrize("factors", GRIDS)
def test_no_pair_of_values_is_lost_and_few_combinations_are_taken(factors) -> None:
    chosen = pairwise(*factors)
    for first, second in combinations(range(len(factors)), 2):
        pairs = set(product(factors[first], factors[second]))
        assert {(one[first], one[second]) for one in chosen} == pairs
    second_largest, largest = sorted(map(len, factors))[-2:]
    assert len(chosen) == second_largest * largest  # as few as can be, for these
    assert chosen == pairwise(*factors)


def test_one_factor_and_two_are_taken_whole() -> None:
    assert pairwise("ab") == [("a",), ("b",)]
    assert pairwise("ab", "cde") == list(product("ab", "cde"))
