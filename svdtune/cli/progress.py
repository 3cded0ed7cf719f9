"""Progress with the time that is left: a bar in a terminal, a line now and then in a log."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


@contextmanager
def counting(label: str, console: Console) -> Iterator[Callable[[int, int], None]]:
    """Give a function to call with (items done, items in all); it shows both, the time taken and
    the time left."""
    if not console.is_terminal:
        yield _lines(label, console)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task(label, total=None)
        yield lambda done, total: progress.update(bar, completed=done, total=total)


def _lines(label: str, console: Console) -> Callable[[int, int], None]:
    """Print one line for every tenth of the way."""
    started = time.monotonic()
    first = shown = -1

    def count(done: int, total: int) -> None:
        nonlocal first, shown
        first = done if first < 0 else first
        if done * 10 // total == shown:
            return
        shown = done * 10 // total
        spent = time.monotonic() - started
        left = f", {spent / (done - first) * (total - done):.0f} s left" if first < done < total else ""
        console.print(f"{label}: {done}/{total} in {spent:.0f} s{left}", highlight=False)

    return count
