"""What SORSA's theory claims and does not hold, with a number each."""

import pytest
import torch

from svdtune.methods.sorsa.math import penalty


def test_theorem_5_1_does_not_hold():
    """Convexity would need f(0) ≤ (f(U) + f(−U)) / 2; for orthonormal U it is √r against 0."""
    U = torch.linalg.qr(torch.randn(9, 4, dtype=torch.float64)).Q
    f = [float(penalty([M])[0]) for M in (U, -U, (U + -U) / 2)]
    assert f[0] == pytest.approx(0, abs=1e-12)
    assert f[1] == pytest.approx(0, abs=1e-12)
    assert f[2] == pytest.approx(2.0)  # √4


def test_equation_42_bounds_the_condition_number_in_the_wrong_direction():
    """κ(U S Vᵀ) can be far below κ(U) κ(S) κ(V), so orthonormal factors can make it worse, not
    better."""
    U, S, V = torch.diag(torch.tensor([1.0, 2.0])), torch.diag(torch.tensor([2.0, 1.0])), torch.eye(2)
    product, parts = torch.linalg.cond(U @ S @ V.mT), torch.linalg.cond(U) * torch.linalg.cond(S)
    assert float(product) == pytest.approx(1)
    assert float(parts) == pytest.approx(4)


def test_equation_16_is_not_the_second_derivative():
    """It claims 2‖WᵀW‖_F ≥ 0 in every direction W. At U = 0 the second derivative is −2‖W‖²_F/√r,
    and at an orthonormal U there is none: the second difference grows as 1/ε."""
    torch.manual_seed(0)
    r = 4
    W = torch.randn(9, r, dtype=torch.float64)

    def second_difference(U, step):
        up, middle, down = (float(penalty([M])[0]) for M in (U + step * W, U, U - step * W))
        return (up - 2 * middle + down) / step**2

    claimed = 2 * float((W.mT @ W).norm())
    assert second_difference(torch.zeros_like(W), 1e-3) == pytest.approx(-2 * float(W.norm()) ** 2 / r**0.5, rel=1e-3)
    U = torch.linalg.qr(torch.randn(9, r, dtype=torch.float64)).Q
    turn = float((U.mT @ W + W.mT @ U).norm())
    for step in (1e-3, 1e-4):
        found = second_difference(U, step)
        assert found == pytest.approx(2 * turn / step, rel=1e-2)
        assert found > 100 * claimed


def test_lemma_5_4_needs_singular_values_of_at_least_one():
    """Eq. 33 bounds a difference by ε. Eq. 34 makes a share of it, which is less where σ < 1."""
    unregularized, epsilon = torch.tensor([2.0, 0.1], dtype=torch.float64), 0.01
    change = torch.diag(torch.tensor([0.0, epsilon], dtype=torch.float64))
    regularized = torch.linalg.svdvals(torch.diag(unregularized) + change)
    assert float((regularized - unregularized).abs().max()) <= epsilon + 1e-12  # Eq. 33
    holds = ((1 - epsilon) * unregularized <= regularized) & (regularized <= (1 + epsilon) * unregularized)
    assert holds.tolist() == [True, False]  # Eq. 12: 0.11 > 1.01 · 0.1


def test_lemma_5_4_starts_from_a_small_gradient_and_it_is_none():
    """Eq. 28 takes ‖∇L_reg‖ as small where UᵀU ≈ I. It is 2, so ε = γ ε_∇ is no smaller near it."""
    U = torch.linalg.qr(torch.randn(30, 5, dtype=torch.float64)).Q
    for error in (1e-1, 1e-3, 1e-6):
        norms, (gradient,) = penalty([U * (1 + error)])
        assert float(norms) < 6 * error
        assert float(gradient.norm()) == pytest.approx(2, rel=0.15)


def test_theorem_5_3_gives_a_bound_and_no_proportionality():
    """Steps η on a training loss of curvature a and a regularizer of curvature c, weighted by γ/η
    (Eq. 6), converge where ηa + γc < 2: at half the rate γ may hardly be larger, and not twice."""
    a, c = 1.0, 4.0

    def converges(rate, gamma):
        point = 1.0
        for _ in range(2000):
            point -= rate * (a * point + gamma / rate * c * point)
        return abs(point) < 1e-3

    largest = {}
    for rate in (0.1, 0.05):
        largest[rate] = (2 - rate * a) / c  # Eq. 25
        assert converges(rate, 0.99 * largest[rate])
        assert not converges(rate, 1.01 * largest[rate])
        assert converges(rate, 0.0)  # which is proportional to nothing
    assert largest[0.05] / largest[0.1] == pytest.approx(1.026, abs=1e-3)


def test_theorem_5_3_needs_a_lipschitz_constant_that_there_is_not():
    U = torch.linalg.qr(torch.randn(20, 3, dtype=torch.float64)).Q
    constants = []
    for error in (1e-2, 1e-3, 1e-4):
        outer, inner = U * (1 + error), U * (1 - error)
        turned = (penalty([outer])[1][0] - penalty([inner])[1][0]).norm()
        constants.append(float(turned / (outer - inner).norm()))
    assert constants[1] / constants[0] == pytest.approx(10, rel=0.1)
    assert constants[2] / constants[1] == pytest.approx(10, rel=0.1)


def test_theorem_5_5_can_be_the_other_way_round():
    """Factors that the regularizer has made orthonormal leave κ(S), here twice that of the product
    without it."""
    U, S = torch.diag(torch.tensor([1.0, 2.0])), torch.diag(torch.tensor([2.0, 1.0]))
    assert float(torch.linalg.cond(U @ S)) == pytest.approx(1)
    assert float(torch.linalg.cond(torch.eye(2) @ S)) == pytest.approx(2)
