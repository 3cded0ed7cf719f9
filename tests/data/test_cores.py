"""Rows are worked on by several processes, and it makes no difference."""

import gc
import os
import signal
from collections.abc import Sequence

import pytest

from svdtune.data import cores
from svdtune.data.cores import CHUNK, uncollected
from svdtune.errors import SvdtuneError

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes share rows where they can be forked")
ITEMS = list(range(2 * CHUNK + 1))


@pytest.fixture(autouse=True)
def _two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "_cores", lambda: 2)
    monkeypatch.setattr(cores, "_FEW", CHUNK)


def test_results_come_in_the_order_of_the_items_from_other_processes() -> None:
    found = list(cores.in_chunks(lambda items: (os.getpid(), sum(items)), ITEMS))
    assert os.getpid() not in {process for process, _ in found}
    starts = range(0, len(ITEMS), CHUNK)
    assert [total for _, total in found] == [sum(ITEMS[start : start + CHUNK]) for start in starts]


def test_the_first_refusal_counts() -> None:
    def refuse(items: Sequence[int]) -> None:
        if items[0] > 0:
            raise SvdtuneError(f"row {items[0]}")

    with pytest.raises(SvdtuneError, match=f"^row {CHUNK}$"):
        list(cores.in_chunks(refuse, ITEMS))


def test_work_of_a_process_that_is_killed() -> None:
    with pytest.raises(SvdtuneError, match="a process that encodes rows was killed"):
        list(cores.in_chunks(lambda items: os.kill(os.getpid(), signal.SIGKILL), ITEMS))


def test_processes_in_processes_are_none() -> None:
    def inner(items: Sequence[int]) -> set[int]:
        return {os.getpid(), *cores.in_chunks(lambda _: os.getpid(), ITEMS)}

    assert all(len(found) == 1 for found in cores.in_chunks(inner, ITEMS))


@pytest.mark.parametrize("enabled", [True, False])
def test_the_search_for_cycles_is_as_it_was_afterwards(enabled: bool) -> None:
    @uncollected()
    def refuse() -> None:
        raise SvdtuneError(f"collected: {gc.isenabled()}")

    was = gc.isenabled()
    (gc.enable if enabled else gc.disable)()
    try:
        with pytest.raises(SvdtuneError, match="collected: False"):
            refuse()
        assert gc.isenabled() == enabled
    finally:
        (gc.enable if was else gc.disable)()
