"""The nuclear norm by polar iteration, and the leading spectrum built on it."""

import pytest
import torch
from weights_with_known_spectra import llama_like, spectra, weight_with

from svdtune.linalg import spectrum
from svdtune.linalg.nuclear import _quintics, nuclear_norm
from svdtune.linalg.spectrum import _leading


@pytest.mark.parametrize("shape", [(300, 300), (900, 300)])
@pytest.mark.parametrize("kind", list(spectra(8)))
def test_error_stays_inside_its_bound(shape, kind):
    values = spectra(300)[kind]
    total, error = nuclear_norm(weight_with(values, *shape).float(), float(values[0]))
    assert abs(total - float(values.sum())) <= error
    if kind in ("flat", "llama", "repeated"):
        assert error < 1e-5 * total


def test_rounding_as_coarse_as_fp16s_neither_diverges_nor_leaves_the_bound(monkeypatch):
    """Rounds every step's result to ten bits, as a GPU does; on a CPU the steps run in fp32."""
    values = llama_like(300)
    weight = weight_with(values, 300, 300).float()
    addmm = torch.addmm

    def rounded(*args, **kwargs):
        bits = addmm(*args, **kwargs).view(torch.int32)
        return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)

    monkeypatch.setattr(torch, "addmm", rounded)
    total, error = nuclear_norm(weight, float(values[0]))
    assert abs(total - float(values.sum())) <= error
    assert error < 1e-4 * total


def test_the_quintics_map_the_interval_to_one():
    x = torch.logspace(-4, 0, 2000, dtype=torch.float64)
    for a, b, c in _quintics(1e-4):
        x = a * x + b * x**3 + c * x**5
    assert (x - 1).abs().max() < 1e-4


@pytest.mark.parametrize("threshold", [0.01, 0.05])
@pytest.mark.slow
def test_leading_values_and_norm_settle_small_thresholds(threshold):
    weight = weight_with(llama_like(1536), 1536, 1600).float()
    exact, found = spectrum(weight), _leading(weight, threshold)
    assert found is not None
    assert len(found.values) < len(exact.values)
    assert abs(found.total - exact.total) <= found.error
    assert (
        (found.values.cumsum(0) - exact.values[: len(found.values)].cumsum(0)).abs() <= found.partial_errors()
    ).all()
    assert found.locate(threshold) == (exact.locate(threshold)[0], True)


def test_large_thresholds_and_repeated_values_are_left_to_the_dense_route():
    assert _leading(weight_with(llama_like(1200), 1200, 1200).float(), 0.9) is None
    assert _leading(weight_with(spectra(1200)["repeated"], 1200, 1200).float(), 0.01) is None
    assert _leading(torch.zeros(1200, 1200), 0.01) is None
