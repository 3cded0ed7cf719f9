"""Spectra and ranks against a float64 SVD."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from weights_with_known_spectra import spectra, weight_with

from pairwise import all_pairs
from svdtune.errors import SvdtuneError
from svdtune.linalg import Spectrum, rank_at_threshold, safe_rank, settled_spectrum, spectrum

THRESHOLDS = [0.005, 0.01, 0.012, 0.05, 0.09, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95]
SHAPES = [(160, 160), (320, 150), (150, 320), (40, 70)]


def svd_rank(weight: torch.Tensor, threshold: float) -> int:
    """The definition, read literally, over the float64 SVD."""
    values = torch.linalg.svdvals(weight.double())
    sums = values.cumsum(0)
    return int((sums < threshold * sums[-1]).sum()) + 1


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", list(spectra(8)))
def test_ranks_equal_those_of_a_float64_svd(shape, kind):
    weight = weight_with(spectra(min(shape))[kind], *shape).float()
    for threshold in THRESHOLDS:
        assert safe_rank(weight, threshold) == svd_rank(weight, threshold), threshold


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_ranks_of_half_precision_weights_are_those_of_the_stored_values(dtype):
    weight = weight_with(spectra(150)["llama"], 150, 200).to(dtype)
    for threshold in THRESHOLDS:
        assert safe_rank(weight, threshold) == svd_rank(weight, threshold), threshold


@pytest.mark.parametrize("kind", ["llama", "repeated", "deficient", "huge", "flat"])
@pytest.mark.family(2)
def test_a_large_weight_falls_back_from_fp32_only_where_it_must(kind):
    weight = weight_with(spectra(1024)[kind], 1024, 1024).float()
    reference = torch.linalg.svdvals(weight.double())
    for threshold in (0.01, 0.09, 0.2, 0.5):
        assert settled_spectrum(weight, threshold)[1] == rank_at_threshold(reference, threshold)


@pytest.mark.parametrize(
    ("shape", "kind", "dtype"), all_pairs(SHAPES, spectra(8), [torch.float32, torch.float64]), ids=str
)
def test_errors_stay_inside_their_bounds(shape, kind, dtype):
    weight = weight_with(spectra(min(shape))[kind], *shape).float()
    found = spectrum(weight, dtype=dtype)
    reference = torch.linalg.svdvals(weight.double())
    assert len(found.values) == min(shape)
    assert abs(found.total - float(reference.sum())) <= found.error
    assert ((found.values.cumsum(0) - reference.cumsum(0)).abs() <= found.partial_errors()).all()
    assert ((found.values - reference).abs() <= found.error).all()


def test_float64_spectra_of_ordinary_weights_are_exact_to_twelve_digits():
    weight = weight_with(spectra(300)["llama"], 400, 300)
    found = spectrum(weight)
    torch.testing.assert_close(found.values, torch.linalg.svdvals(weight), rtol=1e-12, atol=0)
    assert found.error < 1e-11 * found.total


@pytest.mark.parametrize("shape", [(1, 300), (300, 1), (1, 1)])
def test_a_weight_of_one_row_or_column_has_rank_one(shape):
    weight = torch.randn(shape)
    assert [safe_rank(weight, threshold) for threshold in (0.005, 1.0)] == [1, 1]
    assert spectrum(weight).total == pytest.approx(float(weight.double().norm()), rel=1e-12)


@pytest.mark.parametrize("shape", [(3, 5), (200, 300)])
def test_a_zero_weight_has_rank_one(shape):
    found = spectrum(torch.zeros(shape))
    assert (found.total, found.error) == (0.0, 0.0)
    assert rank_at_threshold(found, 0.95) == rank_at_threshold(found.values, 0.95) == 1
    assert safe_rank(torch.zeros(shape), 0.5) == 1


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_weights_at_the_ends_of_fp32_neither_overflow_nor_vanish(size):
    weight = weight_with(spectra(150)["llama"], 150, 150)
    for dtype in (torch.float32, torch.float64):
        found = spectrum((weight * size).float(), dtype=dtype)
        assert found.total == pytest.approx(size * float(spectra(150)["llama"].sum()), rel=1e-5)


def test_an_exact_tie_is_settled_as_the_svd_settles_it():
    # half of the sum is reached at exactly k = 75
    weight = torch.diag(torch.tensor([4.0] * 75 + [1.0] * 300))
    assert safe_rank(weight, 0.5) == 75
    found, k = settled_spectrum(weight, 0.5)
    assert found.reference
    assert k == 75


def test_a_partial_sum_near_its_target_is_redone():
    weight = weight_with(torch.arange(200, 0, -1, dtype=torch.float64), 200, 200)
    exact = spectrum(weight)
    k = 60
    near_tie = float(exact.values[:k].sum()) / exact.total
    rough = Spectrum(exact.values, exact.total, error=1e-3 * exact.total)
    assert rough.locate(near_tie)[1] is False
    settled, rank = settled_spectrum(weight, near_tie, known=rough)
    assert settled is not rough
    assert rank == svd_rank(weight, near_tie)
    assert settled_spectrum(weight, 0.5 * (near_tie + near_tie * (1 + 1 / k)), known=exact)[0] is exact


def test_a_spectrum_cut_short_answers_what_it_holds_and_refuses_the_rest():
    short = Spectrum(torch.tensor([3.0, 2.0], dtype=torch.float64), total=10.0, error=1e-9)
    assert rank_at_threshold(short, 0.4) == 2
    with pytest.raises(SvdtuneError, match="leading values"):
        rank_at_threshold(short, 0.6)


def test_the_threshold_multiplies_the_sum():
    """The listing's `threshold` alone would give 1 here, as it would for nearly every layer of
    LLaMA."""
    assert rank_at_threshold(torch.tensor([2.0, 1.0, 1.0]), 0.6) == 2


@pytest.mark.parametrize("threshold", [0.0, -0.1, 1.0001, math.nan, math.inf])
def test_thresholds_outside_zero_to_one_are_refused(threshold):
    for call in (lambda: rank_at_threshold(torch.ones(3), threshold), lambda: safe_rank(torch.eye(3), threshold)):
        with pytest.raises(SvdtuneError, match=r"threshold must lie in \(0, 1\]"):
            call()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_refused(value):
    weight = torch.randn(30, 20)
    weight[3, 4] = value
    for call in (lambda: spectrum(weight), lambda: safe_rank(weight, 0.1)):
        with pytest.raises(SvdtuneError, match="NaN or infinity"):
            call()


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.randn(3), "matrix"),
        (torch.empty(0, 4), "non-empty"),
        (torch.ones(3, 3, dtype=torch.int8), "dequantize"),
        (torch.empty(3, 3, device="meta"), "meta device"),
    ],
)
def test_what_is_no_weight_is_refused(weight, message):
    with pytest.raises(SvdtuneError, match=message):
        spectrum(weight)


@pytest.mark.parametrize("values", [torch.empty(0), torch.ones(2, 2), torch.tensor([1.0, math.nan]), -torch.ones(2)])
def test_what_is_no_vector_of_singular_values_is_refused(values):
    with pytest.raises(SvdtuneError, match="singular values"):
        rank_at_threshold(values, 0.5)


def test_dtype_other_than_fp32_and_float64_is_refused():
    with pytest.raises(SvdtuneError, match="float64"):
        spectrum(torch.eye(3), dtype=torch.bfloat16)


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.floats(0, 1e6, allow_subnormal=False), min_size=1, max_size=40),
    st.floats(1e-6, 1.0),
)
def test_rank_is_the_least_that_reaches_the_share(values, threshold):
    values = torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
    k = rank_at_threshold(values, threshold)
    sums = values.cumsum(0)
    assert 1 <= k <= len(values)
    assert sums[k - 1] >= threshold * sums[-1]
    assert k == 1 or sums[k - 2] < threshold * sums[-1]
