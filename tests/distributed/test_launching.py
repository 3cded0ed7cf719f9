"""What the environment says of the processes there are."""

import datetime
from collections.abc import Iterable
from typing import Any

import pytest
import torch

from svdtune import processes
from svdtune.cli import _another_tells
from svdtune.errors import SvdtuneError
from svdtune.spectra import decompose


def test_a_rank_alone_does_not_silence_a_run_of_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("RANK", "3")
    assert processes.is_main()
    assert not _another_tells()


def test_of_several_processes_that_have_not_met_yet_one_is_the_main_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "3")
    assert not processes.is_main()
    assert _another_tells()
    monkeypatch.setenv("RANK", "0")
    assert processes.is_main()
    assert not _another_tells()


def test_of_several_processes_one_shows_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    disabled: list[bool] = []

    def bar(items: Iterable, *, disable: bool, **_: Any) -> Iterable:
        disabled.append(disable)
        return items

    monkeypatch.setattr(decompose, "tqdm", bar)
    monkeypatch.setattr(decompose, "without_bar", lambda progress: False)
    for main in (True, False):
        monkeypatch.setattr(processes, "is_main", lambda main=main: main)
        dict(decompose.spectra({"weight": torch.eye(3)}))
    assert disabled == [False, True]


def test_processes_that_do_not_know_their_place_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(
        SvdtuneError, match=r"WORLD_SIZE is 2, .* and LOCAL_RANK is not set; start the run with torchrun"
    ):
        processes.start(True, datetime.timedelta(seconds=1))
