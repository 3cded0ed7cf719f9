"""The routes that only a GPU takes, and agreement between devices."""

import pytest
import torch
from weights_with_known_spectra import llama_like, spectra, weight_with

from svdtune.linalg import factors as module
from svdtune.linalg import orthonormality_error, rank_at_threshold, safe_rank, spectrum, top_factors
from torch_state import allow_tf32, forbid_tf32

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
THRESHOLDS = [0.005, 0.01, 0.05, 0.09, 0.25, 0.5, 0.75, 0.95]


@pytest.mark.parametrize("shape", [(160, 160), (320, 150), (150, 320), (1100, 1100), (1, 300), (300, 1)])
@pytest.mark.parametrize("kind", list(spectra(8)))
def test_ranks_equal_those_of_a_float64_svd(shape, kind):
    weight = weight_with(spectra(min(shape))[kind], *shape).float()
    reference = torch.linalg.svdvals(weight.double())
    for threshold in THRESHOLDS:
        assert safe_rank(weight.cuda(), threshold) == rank_at_threshold(reference, threshold), threshold


@pytest.mark.parametrize("kind", list(spectra(8)))
@pytest.mark.parametrize("choice", [forbid_tf32, allow_tf32])
def test_factors_are_accurate_whatever_the_user_allows(kind, choice, monkeypatch):
    choice()
    monkeypatch.setattr(module, "LARGE", 512)  # for the Krylov route
    weight = weight_with(spectra(900)[kind], 1000, 900).float()
    values = torch.linalg.svdvals(weight.double())
    for r in (5, 40, 400):
        found = top_factors(weight.cuda(), r)
        assert found.U.is_cuda
        assert orthonormality_error(found.U.double()) < 1e-6
        assert orthonormality_error(found.Vh.mT.double()) < 1e-6
        torch.testing.assert_close(found.s.double().cpu(), values[:r], rtol=1e-5, atol=2e-7 * float(values[0]))


@pytest.mark.parametrize("rank", [50, 300])
def test_the_factors_of_a_weight_whose_krylov_space_ends_early(rank, monkeypatch):
    """Passes are taken back there; how often does not depend on when the host looks."""
    monkeypatch.setattr(module, "LARGE", 512)
    values = torch.zeros(640, dtype=torch.float64)
    values[:rank] = llama_like(rank)
    weight = weight_with(values, 700, 640).float().cuda()
    found, again = top_factors(weight, 40), top_factors(weight, 40)
    torch.testing.assert_close(found.s.double().cpu(), values[:40], rtol=1e-5, atol=0)
    assert orthonormality_error(found.U.double()) < 1e-6
    assert orthonormality_error(found.Vh.mT.double()) < 1e-6
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


@pytest.mark.parametrize("n", [300, 900])
def test_cpu_and_gpu_agree_up_to_rounding(n):
    weight = weight_with(llama_like(n), n, n).float()
    ours, theirs = top_factors(weight, 8), top_factors(weight.cuda(), 8)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b.cpu(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(spectrum(weight).values, spectrum(weight.cuda()).values, rtol=1e-10, atol=0)


def test_zero_weights():
    assert safe_rank(torch.zeros(2000, 1500, device="cuda"), 0.5) == 1
    assert orthonormality_error(top_factors(torch.zeros(30, 20, device="cuda"), 4).U) < 1e-6
