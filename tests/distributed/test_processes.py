"""Two and four processes on the CPU against one: the start, the steps, the regularizer, and what is
refused."""

from typing import Any

import pytest
import torch
from tiny_processes import regularizer_gradients, run, started
from tiny_steps import METHODS, train

import new_process

STEPS = {2: 20, 4: 4}


@pytest.fixture(scope="module", params=list(STEPS))
def several(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of several processes found."""
    folder = tmp_path_factory.mktemp(f"processes{request.param}")
    arguments = (request.param, folder, STEPS[request.param])
    running = [new_process.start(run, index, *arguments) for index in range(request.param)]
    for process in running:
        process.result()
    found = [torch.load(folder / f"process-{index}.pt") for index in range(request.param)]
    found[0]["cached"] = len(list((folder / "cache").rglob("*.safetensors")))
    return found


@pytest.fixture(scope="module")
def one() -> dict[str, Any]:
    """The longest run of one process, by method."""
    return {method: train(method, "one", max(STEPS.values())) for method in METHODS}


@pytest.mark.parametrize("method", METHODS)
def test_a_start_is_shared_out_and_the_same_in_every_process(several: list[dict], method: str) -> None:
    alone = started(method)
    starts = [found["starts"][method] for found in several]
    assert sum(start["decomposed"] for start in starts) == alone["decomposed"]
    assert max(start["decomposed"] for start in starts) < alone["decomposed"]
    for start in starts:
        assert start["digest"] == alone["digest"]
        assert start["ranks"] == alone["ranks"]
        assert start["fingerprints"] == alone["fingerprints"]


@pytest.mark.parametrize("method", METHODS)
def test_where_the_main_process_alone_has_the_weights_the_others_help_it(several: list[dict], method: str) -> None:
    alone = started(method)
    starts = [found["main alone"][method] for found in several]
    assert starts[0]["digest"] == alone["digest"]
    assert (
        len({start["digest"] for start in starts[1:]} - {alone["digest"]}) == 1
    )  # nothing: theirs comes when it is sharded
    assert all(start["ranks"] == alone["ranks"] for start in starts)
    assert all(start["fingerprints"] == alone["fingerprints"] for start in starts)
    if alone["decomposed"]:
        assert max(start["decomposed"] for start in starts) < alone["decomposed"]


def test_factors_are_sent_as_they_are_whatever_dtype_a_program_prefers(several: list[dict]) -> None:
    assert {found["another default dtype"] for found in several} == {started("sorsa")["digest"]}


def test_each_spectrum_is_cached_once(several: list[dict]) -> None:
    assert several[0]["cached"] == len(several[0]["starts"]["sara"]["ranks"])


def test_random_starts_are_the_main_processes(several: list[dict]) -> None:
    digests, next_draws = zip(*(found["drawn apart"] for found in several), strict=True)
    assert len(set(digests)) == 1
    assert len(set(next_draws)) == len(several)


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("another model", "disagree on the base model's weights: process {last} differs"),
        ("another rank", "disagree on the adapter's settings: process"),
        ("one bad weight", "model.layers.1.mlp.up_proj"),
        ("one unreadable weight", "the weight cannot be read"),
    ],
)
def test_what_one_process_cannot_do_all_refuse_with_one_sentence(several: list[dict], case: str, expected: str) -> None:
    sentences = {found[case] for found in several}
    assert len(sentences) == 1
    sentence, everywhere = sentences.pop()
    assert everywhere
    assert expected.format(last=len(several) - 1) in sentence


def test_an_unknown_error_in_one_process_ends_the_rounds_of_all(several: list[dict]) -> None:
    last = len(several) - 1
    *others, own = (found["one failed decomposition"] for found in several)
    assert own == ("no room", False)
    assert set(others) == {(f"process {last} of {len(several)}: RuntimeError: no room", True)}


def test_the_regularizer_of_sharded_factors_is_that_of_whole_ones(several: list[dict]) -> None:
    whole = regularizer_gradients(lambda model: model)
    for found in several:
        sharded = found["regularizer"]
        assert sharded["value"] == pytest.approx(whole["value"], rel=1e-6)
        assert sharded["gradients"].keys() == whole["gradients"].keys()
        for name, gradient in whole["gradients"].items():
            torch.testing.assert_close(sharded["gradients"][name], gradient, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_steps_are_those_of_one_process(several: list[dict], one: dict, strategy: str, method: str) -> None:
    expected = one[method]
    for found in several:
        got = found["steps"][strategy, method]
        steps = len(got["losses"])
        assert got["losses"] == pytest.approx(expected["losses"][:steps], abs=1e-5)
        assert got["penalties"] == pytest.approx(expected["penalties"][:steps], abs=1e-4)
        if steps < len(expected["losses"]):
            expected = train(method, "one", steps)
        prefix = "module." if any(name.startswith("module.") for name in got["factors"]) else ""
        for name, factor in expected["factors"].items():
            torch.testing.assert_close(got["factors"][prefix + name], factor, rtol=0, atol=1e-4)
