"""The combinations of a grid that tests run instead of all."""

from itertools import chain, combinations, product

import pytest

from pairwise import all_pairs, shared_out

GRIDS = [("ab", "cde", "fg"), (range(4), range(6), range(3)), (range(4), "ab", "cd", "ef"), (range(10), "ab", "cd")]


@pytest.mark.parametrize("factors", GRIDS)
def test_no_pair_of_values_is_lost_and_few_combinations_are_taken(factors) -> None:
    chosen = all_pairs(*factors)
    for first, second in combinations(range(len(factors)), 2):
        pairs = set(product(factors[first], factors[second]))
        assert {(one[first], one[second]) for one in chosen} == pairs
    second_largest, largest = sorted(map(len, factors))[-2:]
    assert len(chosen) == second_largest * largest  # as few as can be, for these
    assert chosen == all_pairs(*factors)


def test_of_tests_that_share_a_grid_each_meets_every_value() -> None:
    shares = shared_out(["start", "save"], "abc", "de")
    assert sorted(chain(*shares.values())) == sorted(product("abc", "de"))
    assert all({first for first, _ in share} == set("abc") for share in shares.values())
    assert all({second for _, second in share} == set("de") for share in shares.values())


def test_one_factor_and_two_are_taken_whole() -> None:
    assert all_pairs("ab") == [("a",), ("b",)]
    assert all_pairs("ab", "cde") == list(product("ab", "cde"))
