"""What `fast_starts` puts into PEFT stands inside the block alone, and for PEFT as it is known."""

import threading
from typing import Any

import pytest
import torch
from peft.tuners.lora.layer import LoraLayer
from test_fast_starts import R, one_layer, parts, started

from svdtune import SvdtuneWarning, fast_starts
from svdtune.starts import inside_peft


def functions() -> list[Any]:
    return [getattr(place.owner, place.name) for place in inside_peft.places()]


@pytest.fixture
def decomposed(monkeypatch) -> list[int]:
    """The ranks that svdtune's engine was asked for."""
    asked: list[int] = []
    engine = inside_peft.factors

    def noted(weights, ranks, **settings):
        asked.extend(ranks.values())
        return engine(weights, ranks, **settings)

    monkeypatch.setattr(inside_peft, "factors", noted)
    return asked


def test_nothing_is_changed_outside_the_block(decomposed):
    own = functions()
    with fast_starts():
        assert all(door is not before for door, before in zip(functions(), own, strict=True))
        with fast_starts():
            started(one_layer("wide", torch.float32), "pissa")
        started(one_layer("wide", torch.float32), "pissa")
    assert functions() == own
    with pytest.raises(ZeroDivisionError), fast_starts():
        raise ZeroDivisionError
    assert functions() == own
    started(one_layer("wide", torch.float32), "pissa")
    assert decomposed == [R, R]


def test_other_threads_keep_pefts_own(decomposed):
    """A thread that enters no block has PEFT's own start while another is inside; one that leaves
    takes nothing from one that stays."""
    own, inside, leave = functions(), threading.Event(), threading.Event()

    def stay() -> None:
        with fast_starts():
            inside.set()
            leave.wait(60)
            started(one_layer("wide", torch.float32), "pissa")

    thread = threading.Thread(target=stay)
    thread.start()
    assert inside.wait(60)
    started(one_layer("wide", torch.float32), "pissa")
    assert decomposed == []
    with fast_starts():
        pass
    leave.set()
    thread.join()
    assert decomposed == [R]
    assert functions() == own


def test_what_stands_there_since_stays(monkeypatch, decomposed):
    """Somebody else's function, put into the place inside the block, outlives it."""
    monkeypatch.setattr(LoraLayer, "pissa_init", LoraLayer.pissa_init)  # put back after the test
    with fast_starts():
        door = LoraLayer.pissa_init
        LoraLayer.pissa_init = lambda *args: door(*args)
        theirs = LoraLayer.pissa_init
    assert LoraLayer.pissa_init is theirs
    model = started(one_layer("wide", torch.float32), "pissa")  # by way of ours to PEFT's
    assert parts(model)[3].lora_A["default"].weight.shape == (R, 56)
    assert decomposed == []


def test_another_signature_of_pefts_runs_pefts_own_and_says_so_once(monkeypatch, decomposed):
    own = LoraLayer.pissa_init

    def changed(self: Any, adapter_name: str, init_lora_weights: str, more: int = 0) -> None:
        own(self, adapter_name, init_lora_weights)

    monkeypatch.setattr(LoraLayer, "pissa_init", changed)
    monkeypatch.setattr(inside_peft._Patches, "warned", False)
    block = fast_starts()
    with pytest.warns(SvdtuneWarning, match="another pissa_init than svdtune knows, so PEFT's own start runs"):
        block.__enter__()
    assert LoraLayer.pissa_init is changed
    started(one_layer("wide", torch.float32), "pissa")
    block.__exit__(None, None, None)
    with fast_starts():  # a second warning would be an error
        started(one_layer("wide", torch.float32), "olora")
    assert decomposed == []


def test_a_rank_beyond_the_weights_is_cut_short_as_peft_does(decomposed):
    with fast_starts():
        model = started(one_layer("wide", torch.float32), "pissa", r=50)
    assert parts(model)[3].lora_A["default"].weight.shape == (24, 56)
    assert decomposed == []
