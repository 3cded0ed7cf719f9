"""ΔΣ, ΔD and the subspace angle: against the paper's formulas written out, and where two singular
values change places."""

import math

import pytest
import torch

from svdtune.linalg import Factors
from svdtune.linalg.deviation import (
    compared_factors,
    condition_number,
    delta_d,
    delta_sigma,
    deviation,
    product_values,
    subspace_angle,
    subspace_size,
)


def orthonormal(n: int, r: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(n, r, dtype=torch.float64)).Q


@pytest.mark.parametrize("shape", [(12, 12), (20, 9), (7, 15)])
def test_the_paper_formulas_term_by_term(shape: tuple[int, int]) -> None:
    first = torch.randn(shape)
    second = first + 0.1 * torch.randn(shape)
    U0, s0, V0 = torch.linalg.svd(first.double(), full_matrices=False)
    Ut, st, Vt = torch.linalg.svd(second.double(), full_matrices=False)
    k = min(shape)
    sigma = sum(abs(float(st[i]) - float(s0[i])) for i in range(k)) / k
    turn = 1 - sum(abs(float(Ut[:, i] @ U0[:, i])) + abs(float(Vt[i] @ V0[i])) for i in range(k)) / (2 * k)
    found = deviation(compared_factors(first), compared_factors(second))
    assert found.k == k
    assert found.delta_sigma == pytest.approx(sigma, abs=1e-5)
    assert found.delta_d == pytest.approx(turn, abs=1e-4)


def test_nothing_moved_is_exactly_nothing() -> None:
    factors = compared_factors(torch.randn(30, 20))
    assert delta_sigma(factors.s, factors.s) == 0
    assert deviation(factors, factors).delta_d == pytest.approx(0, abs=1e-6)
    assert deviation(factors, factors).angle == pytest.approx(0, abs=1e-3)


def test_signs_of_singular_vectors_do_not_matter() -> None:
    first, second = compared_factors(torch.randn(9, 6)), compared_factors(torch.randn(9, 6))
    turned = Factors(-second.U, second.s, -second.Vh)
    assert deviation(first, turned) == pytest.approx(deviation(first, second))


def test_delta_d_jumps_where_two_close_values_change_places_and_the_angle_does_not() -> None:
    U, V = orthonormal(40, 40), orthonormal(40, 40)
    values = torch.linspace(1, 40, 40, dtype=torch.float64).flip(0)
    values[:8] += 50  # the widest gap lies after the eighth
    values[3] = values[2] - 1e-2  # far enough apart that fp32 does not mix their vectors
    swapped = values.clone()
    swapped[2], swapped[3] = values[3], values[2]
    start, now = (compared_factors(U @ torch.diag(v) @ V.mT) for v in (values, swapped))
    found = deviation(start, now)
    assert found.delta_sigma < 1e-3  # the weight moved by a hundredth in two of its singular values
    # and two of forty pairs of vectors turned by 90°
    assert found.delta_d == pytest.approx(2 / 40, abs=1e-3)
    assert found.p == 8
    assert found.angle < 0.05


def test_angles_of_known_planes() -> None:
    for degrees in (0.0, 1e-5, 30.0, 89.9999, 90.0):
        turn = math.radians(degrees)
        first = torch.tensor([[1.0, 0, 0], [0, 1, 0]], dtype=torch.float64).mT
        second = torch.tensor([[1.0, 0, 0], [0, math.cos(turn), math.sin(turn)]], dtype=torch.float64).mT
        assert subspace_angle(first, second) == pytest.approx(degrees, abs=1e-9)


def test_the_subspace_ends_at_the_widest_gap() -> None:
    values = torch.ones(64)
    values[:11] = 5
    assert subspace_size(values) == 11
    assert subspace_size(torch.tensor([3.0, 2.0, 0.0])) == 1
    assert subspace_size(torch.tensor([1.0])) == 1


def test_leading_triplets_of_a_large_weight() -> None:
    weight = torch.randn(1100, 1040)
    found = compared_factors(weight, 3)
    expected = torch.linalg.svdvals(weight.double())[:3].float()
    torch.testing.assert_close(found.s, expected, rtol=1e-4, atol=0)
    assert found.U.shape == (1100, 3)


def test_all_triplets_of_a_wide_weight_are_compared_and_a_sample_says_less() -> None:
    torch.manual_seed(0)
    # σ_i = 10/i: the first values lie far apart, the others crowd as those of real weights do
    U, V = (torch.linalg.qr(torch.randn(1040, 1040)).Q for _ in range(2))
    first = U * (10 / torch.arange(1, 1041)) @ V.mT
    second = first + 1e-4 * torch.randn(1040, 8) @ torch.randn(8, 1040)
    U0, _, V0 = torch.linalg.svd(first, full_matrices=False)
    Ut, _, Vt = torch.linalg.svd(second, full_matrices=False)
    turned = 1 - float(((Ut * U0).sum(0).abs() + (Vt * V0).sum(1).abs()).mean()) / 2  # Eq. 8-10
    found = deviation(compared_factors(first), compared_factors(second))
    assert found.k == 1040
    assert found.delta_d == pytest.approx(turned, abs=1e-3)
    sampled = deviation(compared_factors(first, 64), compared_factors(second, 64))
    assert sampled.k == 64
    assert (found.delta_d, sampled.delta_d) == pytest.approx((0.81, 0.01), abs=0.01)


def test_values_of_a_product_without_forming_it() -> None:
    A, B = torch.randn(30, 5), torch.randn(20, 5)
    expected = torch.linalg.svdvals((B @ A.mT).double())[:5]
    torch.testing.assert_close(product_values(A, B), expected, rtol=1e-5, atol=0)
    assert condition_number(product_values(A, B)) == pytest.approx(float(expected[0] / expected[-1]), rel=1e-4)
    assert condition_number(product_values(A, torch.zeros(20, 5))) == math.inf


def test_a_diverged_factor_condition_number_is_not_bounded_by_that_of_s() -> None:
    """Eq. 42 bounds κ(USVᵀ) by κ(S): a U that is not orthonormal breaks it, so it is measured."""
    U, s = torch.diag(torch.tensor([1.0, 2.0])), torch.tensor([2.0, 1.0])
    assert condition_number(product_values(torch.eye(2), U * s)) == pytest.approx(1.0)
    assert condition_number(s) == 2.0
    assert delta_d(compared_factors(torch.eye(2)), compared_factors(torch.eye(2))) == 0
