"""Work on many rows, shared out among the cores of this machine."""

import gc
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, TypeVar

from svdtune import processes
from svdtune.errors import SvdtuneError

Item = TypeVar("Item")
Result = TypeVar("Result")
CHUNK = 1000  # items that are worked on together
_FEW = 4 * CHUNK  # up to which starting processes costs more than it saves
_shared: dict[str, Any] = {}  # what processes that are forked find: it need not be sent


def in_chunks(work: Callable[[Sequence[Item]], Result], items: Sequence[Item]) -> Iterator[Result]:
    """Yield what `work` makes of each thousand of the items, in their order.

    Args:
        work: gives the same in any process; what it gives is sent to this one.
        items: what is worked on.

    Raises:
        SvdtuneError: of `work`, for the first chunk that it refuses; if a process was killed.
    """
    starts = range(0, len(items), CHUNK)
    count = min(_cores() // processes.launched(), len(starts))
    # Only a fork shares the items as they are. macOS has forks, and libraries that fail in them.
    if count < 2 or len(items) <= _FEW or not sys.platform.startswith("linux") or _shared:
        yield from (work(items[start : start + CHUNK]) for start in starts)
        return
    _shared.update(work=work, items=items)
    gc.freeze()  # a collection in one of the processes would go through all items, and copy their pages
    pool = ProcessPoolExecutor(count, multiprocessing.get_context("fork"), _prepare)
    try:
        yield from pool.map(_work, starts)
    except BrokenProcessPool as error:
        raise SvdtuneError(
            f"a process that encodes rows was killed, perhaps for want of memory: there were {count} of them; give the run "
            "fewer cores (taskset -c 0 svdtune ...)"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)
        gc.unfreeze()
        _shared.clear()


@contextmanager
def uncollected() -> Iterator[None]:
    """Put off Python's search for cycles: it would go through all rows again and again while more
    are made, and rows hold none."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _prepare() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that forked this one looks after it
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is a process a core already


def _work(start: int) -> Any:
    return _shared["work"](_shared["items"][start : start + CHUNK])
