"""Leading factors against a float64 SVD, and the promises about orthonormality, signs and
reproducibility."""

import math
import sys

import pytest
import torch
from weights_with_known_spectra import llama_like, spectra, weight_with

from operations import Operations
from pairwise import all_pairs
from svdtune.errors import SvdtuneError
from svdtune.linalg import (
    all_factors,
    band_factors,
    band_of,
    factors_at_threshold,
    krylov,
    nuclear,
    orthonormality_error,
    settled_spectrum,
    spectrum,
    top_factors,
)
from svdtune.linalg import factors as module


@pytest.fixture(autouse=True)
def krylov_from_512(monkeypatch):
    """Let the Krylov route take matrices that a test can decompose quickly."""
    monkeypatch.setattr(module, "LARGE", 512)


SHAPES = [(96, 96), (200, 60), (60, 200)]


def check(weight: torch.Tensor, r: int, rtol: float = 1e-5) -> None:
    """top_factors(weight, r) has the right shapes and values, orthonormal vectors, and approximates
    as well as can be."""
    found = top_factors(weight, r)
    values = torch.linalg.svdvals(weight.double())
    assert found.U.shape == (weight.shape[0], r)
    assert found.Vh.shape == (r, weight.shape[1])
    assert {part.dtype for part in found} == {torch.float32}
    torch.testing.assert_close(found.s.double(), values[:r], rtol=rtol, atol=2e-7 * float(values[0]) + 1e-12)
    assert (found.s.diff() <= 0).all()
    assert (found.s >= 0).all()
    assert orthonormality_error(found.U.double()) < 1e-6
    assert orthonormality_error(found.Vh.mT.double()) < 1e-6
    U, s, Vh = (part.double() for part in found)
    rest = torch.linalg.matrix_norm(weight.double() - (U * s) @ Vh)
    assert rest <= values[r:].norm() * (1 + 1e-6) + 1e-6 * values.norm() + 1e-12


@pytest.mark.parametrize(("shape", "kind", "r"), all_pairs(SHAPES, spectra(8), [1, 7, 60]), ids=str)
def test_small_weights(shape, kind, r):
    check(weight_with(spectra(min(shape))[kind], *shape).float(), r)


@pytest.mark.parametrize("shape", [(700, 700), (1500, 640), (640, 1500)])
@pytest.mark.parametrize("kind", list(spectra(8)))
def test_weights_large_enough_for_krylov(shape, kind):
    check(weight_with(spectra(min(shape))[kind], *shape).float(), 40)


@pytest.mark.parametrize("kind", ["llama", "exponential"])
def test_krylov_agrees_with_the_dense_route_vector_by_vector(kind, monkeypatch):
    weight = weight_with(spectra(800)[kind], 800, 900).float()
    dense = torch.linalg.svd(weight.double(), full_matrices=False)
    monkeypatch.setattr(module, "_by_gram", lambda *_: pytest.fail("the Krylov route gave up"))
    found = top_factors(weight, 16)
    overlap = (found.Vh.double() * dense.Vh[:16]).sum(1)
    assert (overlap.abs() > 1 - 1e-6).all()


@pytest.mark.parametrize("shape", [(640, 640), (900, 640)], ids=str)
@pytest.mark.parametrize("first", [2, 10, 60])  # times the smallest value that is wanted; 60 takes float64
@pytest.mark.parametrize("formed", [True, False])
def test_krylov_gives_the_best_approximation_to_rounding(shape, first, formed, monkeypatch):
    """What PiSSA starts from: values settle before the vectors on the two sides of the rank do."""
    values, r = llama_like(640), 24
    values[0] = first * values[r - 1]
    weight = weight_with(values, *shape).float()
    monkeypatch.setattr(module, "_by_gram", lambda *_: pytest.fail("the Krylov route gave up"))
    if not formed:
        monkeypatch.setattr(module, "gram", lambda *_: None)
    found = top_factors(weight, r)
    U, s, Vh = torch.linalg.svd(weight.double(), full_matrices=False)
    best = (U[:, :r] * s[:r]) @ Vh[:r]
    assert (best - (found.U * found.s).double() @ found.Vh.double()).norm() <= 2e-6 * best.norm()
    torch.testing.assert_close(found.s.double(), s[:r], rtol=5e-7, atol=0)


def exhausted(rank: int) -> torch.Tensor:
    """A weight [700, 640] of that rank, whose Krylov space ends early."""
    values = torch.zeros(640, dtype=torch.float64)
    values[:rank] = llama_like(rank)
    return weight_with(values, 700, 640).float()


@pytest.mark.parametrize("rank", [3, 50, 300, 640])
def test_a_pass_that_took_too_much_for_granted_is_taken_back(rank, monkeypatch):
    """The basis is then, bit for bit, that of passes that are looked at one by one."""
    weight, bases = exhausted(rank), []
    for ahead in (False, True):
        monkeypatch.setattr(krylov, "runs_ahead", lambda _, ahead=ahead: ahead)
        found = krylov.BlockKrylov(weight, 32, 512)
        while found.room:
            found.extend()
        values, _, _ = found.ritz()
        assert found._looks is (rank < 640 or not ahead)
        bases.append((found.p, values, found.Q[: found.p]))
    (p, values, Q), (taken_back, *others) = bases
    assert taken_back == p
    assert all(torch.equal(*pair) for pair in zip((values, Q), others, strict=True))


def test_a_look_makes_up_for_passes_that_are_taken_back(monkeypatch):
    """Here the first pass is among them; a caller counts on as many directions as it asked for."""
    monkeypatch.setattr(krylov, "runs_ahead", lambda _: True)
    found = krylov.BlockKrylov(weight_with(spectra(640)["power"], 640, 640).float(), 32, 512)
    for _ in range(4):
        found.extend()
    values, vectors, residuals = found.ritz()
    assert found.p == len(values) == len(vectors) == len(residuals) == 128
    assert found._looks


def test_operations_and_looks_of_eight_passes(monkeypatch):
    """What a GPU is asked for and waited for. It was 280 and 8."""
    monkeypatch.setattr(krylov, "runs_ahead", lambda _: True)
    found = krylov.BlockKrylov(weight_with(llama_like(600), 600, 600).float(), 32, 512)
    with torch.no_grad(), Operations() as counted:
        for _ in range(8):
            found.extend()
    assert (counted.count, counted.looks) == (138, 1)


@pytest.mark.parametrize(("n", "r"), [(1024, 8), (1024, 16), (1024, 64), (1536, 32)])
def test_a_gpu_solves_the_projected_problem_of_spectra_like_llamas_once(n, r, monkeypatch):
    """And not much later than it could: three passes before, it is not yet done."""
    monkeypatch.setattr(krylov, "runs_ahead", lambda _: True)
    looks, ritz = [], krylov.BlockKrylov.ritz
    monkeypatch.setattr(krylov.BlockKrylov, "ritz", lambda self: looks.append(self) or ritz(self))
    weight = torch.diag(llama_like(n)).float()
    values = top_factors(weight, r).s
    torch.testing.assert_close(values, weight.diagonal()[:r], rtol=5e-7, atol=0)
    (found,) = looks
    found.p -= 3 * found.block
    squared, _, residuals = ritz(found)
    assert (residuals[:r] > module._RESIDUAL * squared[r - 1]).any()


def test_more_copies_of_a_value_than_a_block_holds_are_all_found():
    """From one start block, Krylov iteration finds at most a block's worth of copies; that must be
    noticed."""
    values = torch.cat([torch.full((90,), 5.0), torch.linspace(2, 1, 910)]).double()
    check(weight_with(values, 1000, 1000).float(), 64)


def test_one_huge_value_does_not_drown_the_rest():
    values = torch.cat([torch.tensor([3e4]), llama_like(999).float()]).double()
    check(weight_with(values, 1000, 1000), 32)


@pytest.mark.parametrize("shape", [(700, 700), (30, 50)])
def test_null_vectors_are_completed(shape):
    values = torch.zeros(min(shape), dtype=torch.float64)
    values[:5] = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0])
    check(weight_with(values, *shape).float(), 12)
    check(torch.zeros(shape), 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_dtype_gives_fp32_factors_of_the_stored_values(dtype):
    check(weight_with(llama_like(80), 80, 120).to(dtype), 10)


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_sizes_at_the_ends_of_fp32(size):
    values = llama_like(700)
    found = top_factors((weight_with(values, 700, 700) * size).float(), 30)
    torch.testing.assert_close(found.s.double() / size, values[:30], rtol=1e-5, atol=0)


@pytest.mark.parametrize("n", [80, 700])
def test_same_weight_same_factors_whatever_the_random_state(n):
    weight = weight_with(llama_like(n), n, n).float()
    first = top_factors(weight, 12)
    torch.manual_seed(123)
    state = torch.get_rng_state()
    top_factors(torch.randn(90, 90), 3)
    torch.set_rng_state(state)
    second = top_factors(weight, 12)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("n", [80, 700])
def test_signs_do_not_depend_on_the_route_or_on_a_flip(n):
    weight = weight_with(llama_like(n), n, n)
    ours = top_factors(weight, 8)
    flipped = top_factors(-weight, 8)
    torch.testing.assert_close(ours.Vh, flipped.Vh, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours.U, -flipped.U, rtol=0, atol=1e-5)
    largest = ours.Vh.gather(1, ours.Vh.abs().argmax(1, keepdim=True))
    near_ties = (ours.Vh.abs() > 0.9 * largest.abs()).sum(1) > 1
    assert (largest[~near_ties] > 0).all()


def test_gradients_and_autocast_do_not_leak_in():
    weight = weight_with(llama_like(64), 64, 64).float().requires_grad_()
    plain = top_factors(weight, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = top_factors(weight, 4)
    assert not any(part.requires_grad for part in plain)
    assert all(torch.equal(a, b) for a, b in zip(plain, under_autocast, strict=True))


def test_a_default_device_of_the_users_changes_nothing():
    weight = weight_with(llama_like(640), 640, 640).float()

    def found() -> list[torch.Tensor]:
        krylov._start.cache_clear()
        nuclear._quintics.cache_clear()
        known, k = settled_spectrum(weight, 0.05)
        norm = nuclear.nuclear_norm(weight, 2.0)
        zero = spectrum(torch.zeros(3, 2, device="cpu"))
        return [*top_factors(weight, k), known.partial_errors(), torch.tensor(norm, device="cpu"), zero.values]

    expected = found()
    with torch.device("meta"):
        others = found()
    assert all(torch.equal(*pair) for pair in zip(others, expected, strict=True))


@pytest.mark.parametrize("r", [0, -1, 21])
def test_ranks_that_a_weight_cannot_have_are_refused(r):
    with pytest.raises(SvdtuneError, match=r"outside 1 … 20"):
        top_factors(torch.randn(30, 20), r)


def test_weights_that_are_not_finite_are_refused():
    with pytest.raises(SvdtuneError, match="NaN or infinity"):
        top_factors(torch.full((4, 4), float("nan")), 1)


def test_orthonormality_error():
    assert orthonormality_error(torch.eye(5, 3)) == 0
    assert orthonormality_error(2 * torch.eye(5, 3)) == pytest.approx(3 * 3**0.5)
    assert orthonormality_error(torch.eye(5, 3, dtype=torch.bfloat16)).dtype == torch.float32


@pytest.mark.parametrize(
    ("shape", "kind", "threshold"),
    all_pairs([(300, 200), (200, 300), (100, 90)], spectra(8), [0.01, 0.5, 0.95]),
    ids=str,
)
def test_rank_and_factors_from_one_decomposition(shape, kind, threshold):
    weight = weight_with(spectra(min(shape))[kind], *shape).float()
    found, factors = factors_at_threshold(weight, threshold)
    known, k = settled_spectrum(weight, threshold)
    assert found.locate(threshold) == (k, True)
    assert factors.s.shape == (k,)
    torch.testing.assert_close(found.values[:k], known.values[:k], rtol=1e-6, atol=1e-6 * known.total + 1e-12)
    separate = top_factors(weight, k)
    torch.testing.assert_close(factors.s, separate.s, rtol=1e-5, atol=1e-6 * known.total + 1e-12)
    approximations = [(one.U * one.s) @ one.Vh for one in (factors, separate)]
    best = float(known.values[k:].norm()) if kind != "zero" else 0.0
    for approximation in approximations:
        error = float((weight - approximation).norm())
        assert error <= best * (1 + 1e-4) + 1e-5 * known.total + 1e-12
    again, same = factors_at_threshold(weight, threshold, found)
    assert again is found
    torch.testing.assert_close(same.s, factors.s, rtol=1e-5, atol=1e-6 * known.total + 1e-12)


def test_one_gram_matrix_serves_the_rank_and_the_factors(monkeypatch):
    formed = []
    gram = module.gram
    monkeypatch.setattr(module, "gram", lambda *a: formed.append(1) or gram(*a))
    monkeypatch.setattr(sys.modules["svdtune.linalg.spectrum"], "gram", lambda *_: pytest.fail("formed once more"))
    _, found = factors_at_threshold(weight_with(llama_like(200), 200, 300).float(), 0.5)
    assert len(formed) == 1
    assert len(found.s) > 20


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("components", ["first", "middle", "last", (3, 9)], ids=str)
@pytest.mark.parametrize(("shape", "kind"), all_pairs([*SHAPES, (700, 640)], spectra(8)), ids=str)
def test_a_band_is_that_of_a_float64_svd(shape, kind, components, exact):
    """Values, orthonormal vectors and the product, which single vectors of close values do not
    settle."""
    n = min(shape)
    weight = weight_with(spectra(n)[kind], *shape).float()
    start, stop = band_of(components, 6, n)
    found = band_factors(weight, start, stop, exact=exact)
    U, s, Vh = torch.linalg.svd(weight.double(), full_matrices=False)
    largest = float(s[0])
    torch.testing.assert_close(found.s.double(), s[start:stop], rtol=1e-5, atol=2e-7 * largest)
    assert orthonormality_error(found.U.double()) < 1e-6
    assert orthonormality_error(found.Vh.mT.double()) < 1e-6
    assert (found.s.diff() <= 0).all()
    got = (found.U * found.s).double() @ found.Vh.double()
    torch.testing.assert_close(
        weight.double() @ found.Vh.mT.double(), (found.U * found.s).double(), atol=1e-6 * largest, rtol=0
    )
    apart = [i for i in (start, stop) if 0 < i < n]
    if all(float(s[i - 1] - s[i]) > 1e-3 * largest for i in apart):  # else any basis is right
        expected = (U[:, start:stop] * s[start:stop]) @ Vh[start:stop]
        torch.testing.assert_close(got, expected, atol=1e-4 * largest, rtol=0)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("smallest", [1e-2, 1e-5, 1e-9, 0])
def test_all_triplets_or_none_where_the_smallest_vanish(shape, smallest):
    values = torch.logspace(0, math.log10(smallest or 1), min(shape)).double() * (smallest > 0)
    weight = weight_with(values, *shape).float()
    found = all_factors(weight)
    if smallest < 1e-5:
        assert found is None
        return
    values = torch.linalg.svdvals(weight.double())
    torch.testing.assert_close(found.s.double(), values, rtol=2e-7, atol=0)
    assert orthonormality_error(found.U.double()) < 1e-6
    assert orthonormality_error(found.Vh.mT.double()) < 1e-6
    assert ((found.U * found.s).double() @ found.Vh.double() - weight).norm() < 1e-6


@pytest.mark.parametrize("band", [(-1, 2), (2, 2), (3, 2), (0, 9)])
def test_a_band_outside_the_spectrum_is_refused(band):
    with pytest.raises(SvdtuneError, match=r"lies outside the spectrum of a weight \(8, 10\)"):
        band_factors(torch.ones(8, 10), *band)
