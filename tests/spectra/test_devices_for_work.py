"""Weights on the CPU are decomposed on the device that is named, else the fastest there is, and
results come back to where the weights lie."""

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from svdtune.errors import SvdtuneError, SvdtuneWarning
from svdtune.linalg import Factors, top_factors
from svdtune.spectra import decompose, factors, ranked_factors, ranks, spectra
from svdtune.spectra.devices import CPU, devices_for_work, on_device
from svdtune.starts.pairs import LoraPair

META = torch.device("meta")  # the one other device that every machine has


def test_the_name_goes_before_the_environment_and_that_before_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert devices_for_work() == [torch.device("cuda", 0), torch.device("cuda", 1)]
    monkeypatch.setenv("SVDTUNE_DEVICE", "meta")
    assert devices_for_work() == [META]
    assert devices_for_work("cpu") == [CPU]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("SVDTUNE_DEVICE")
    assert devices_for_work() == [CPU]


def test_of_several_processes_each_takes_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr("svdtune.processes.count", lambda: 4)
    assert devices_for_work() == [torch.device("cuda", 3)]


@pytest.mark.parametrize("word", ["gpu", "cuda:99", "cpux"])
def test_a_device_that_is_not_there(word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SvdtuneError, match=rf"the device '{word}' is not there; expected one of cpu"):
        devices_for_work(word)
    monkeypatch.setenv("SVDTUNE_DEVICE", word)
    with pytest.raises(SvdtuneError, match="is not there"):
        ranks({"a": torch.eye(3)}, 0.5)


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory")])
def test_a_full_device_hands_the_weight_back(error: Exception) -> None:
    weight = torch.randn(5, 4)

    def compute(there: Tensor) -> Factors:
        if there.is_meta:
            raise error
        return top_factors(there, 2)

    with pytest.warns(SvdtuneWarning, match=r"meta has no room to decompose a weight \[5, 4\].*SVDTUNE_DEVICE=cpu"):
        found = on_device(compute, weight, META)
    for one, other in zip(found, top_factors(weight, 2), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("home", [torch.device("cuda", 0), CPU])
def test_a_weight_on_the_full_device_itself_goes_to_the_cpu(home: torch.device) -> None:
    weight: Any = SimpleNamespace(device=home, shape=(5, 4), to=lambda there: there)

    def compute(there: Any) -> str:
        if there == home:
            raise torch.OutOfMemoryError("out of memory")
        return str(there)

    if home == CPU:
        with pytest.raises(torch.OutOfMemoryError):
            on_device(compute, weight, home)  # type: ignore[arg-type]
        return
    with pytest.warns(SvdtuneWarning, match=r"cuda:0 has no room .* which is done on cpu instead"):
        assert on_device(compute, weight, home) == "cpu"  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "wrap", [lambda found: found, lambda found: (None, found), lambda found: LoraPair(*found[::2])]
)
def test_all_tensors_that_are_found_come_back(wrap: Any) -> None:
    """Whatever holds them. A tensor without values cannot: torch says that it was asked to."""
    found = wrap(Factors(*(torch.zeros(2, 2, device=META) for _ in range(3))))
    with pytest.raises(NotImplementedError, match="meta"):
        on_device(lambda there: found, torch.eye(2), META)


def test_another_error_is_not_taken_for_a_full_device() -> None:
    def compute(there: Tensor) -> Tensor:
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        on_device(compute, torch.eye(2), META)


@pytest.mark.parametrize("size", [6, 1030])  # several at once, and one after the other
@pytest.mark.parametrize(
    "work",
    [
        lambda weights, **how: list(spectra(weights, **how)),
        lambda weights, **how: ranks(weights, 0.1, **how),
        lambda weights, **how: list(ranked_factors(weights, 0.1, **how)),
        lambda weights, **how: list(factors(weights, dict.fromkeys(weights, 2), **how)),
    ],
    ids=["spectra", "ranks", "ranked_factors", "factors"],
)
def test_every_kind_of_work_goes_to_the_device(work: Any, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two devices in turn, for weights on the CPU only."""
    went = []
    taken = decompose.on_device

    def watched(compute: Any, weight: Tensor, device: torch.device) -> Any:
        went.append(device)
        return taken(compute, weight, CPU)

    monkeypatch.setattr(decompose, "on_device", watched)
    monkeypatch.setattr(decompose, "devices_for_work", lambda named: [META, CPU] if named is None else [CPU])
    weights = {str(at): torch.randn(size, 3, generator=torch.Generator().manual_seed(at)) for at in range(4)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        work(weights)
        assert sorted(map(str, went)) == ["cpu", "cpu", "meta", "meta"]
        went.clear()
        work({name + "b": weight + 1 for name, weight in weights.items()}, device="cpu")
    assert went == [CPU] * 4
