"""Several weights of a GPU at once give what one at a time gives."""

import pytest
import torch

from svdtune.errors import SvdtuneError
from svdtune.linalg import safe_rank, top_factors
from svdtune.spectra import factors, ranked_factors, ranks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture
def weights():
    generator = torch.Generator().manual_seed(1)
    shapes = [(300, 200), (1200, 1100), (64, 900), (700, 700)] * 4
    return {str(i): torch.randn(shape, generator=generator).cuda() for i, shape in enumerate(shapes)}


def test_order_and_results_are_those_of_one_at_a_time(weights):
    found = factors(weights, dict.fromkeys(weights, 16))
    for (name, together), expected in zip(found, weights, strict=True):
        assert name == expected
        alone = top_factors(weights[name], 16)
        for a, b in zip(together, alone, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert ranks(weights, 0.05) == {name: safe_rank(weight, 0.05) for name, weight in weights.items()}


def test_the_same_weight_has_one_key_on_every_device(weights, monkeypatch):
    first = ranks(weights, 0.05)
    from svdtune.spectra import decompose

    monkeypatch.setattr(decompose, "_store_spectrum", lambda *_: pytest.fail("decomposed again"))
    assert ranks({name: weight.cpu() for name, weight in weights.items()}, 0.05) == first


def test_errors_come_out_of_the_threads(weights):
    weights["7"] = torch.full((50, 50), float("nan"), device="cuda")
    with pytest.raises(SvdtuneError, match=r"7: .*NaN"):
        ranks(weights, 0.1)
    assert ranks({"0": weights["0"]}, 0.1)


def test_weights_on_the_cpu_are_decomposed_on_the_gpu_and_come_back(weights):
    on_cpu = {name: weight.cpu() for name, weight in weights.items()}
    there, here = (dict(factors(some, dict.fromkeys(some, 16))) for some in (weights, on_cpu))
    for name, found in here.items():
        for a, b in zip(found, there[name], strict=True):
            assert a.device.type == "cpu"
            torch.testing.assert_close(a, b.cpu(), rtol=1e-5, atol=1e-5)
    for name, (U, s, Vh) in ranked_factors(on_cpu, 0.05):
        assert {part.device.type for part in (U, s, Vh)} == {"cpu"}, name
    assert ranks(on_cpu, 0.05) == ranks(on_cpu, 0.05, device="cpu")
