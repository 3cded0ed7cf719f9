"""Progress with the time that is left: a bar on a terminal and in a notebook, elsewhere a line now
and then."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from tqdm import tqdm


class Progress:
    """How far something has come; elsewhere than on a terminal a line at most every `every`
    seconds, and at the end."""

    def __init__(self, label: str, console: Console, every: float = 10.0):
        self.label, self.console, self.every = label, console, every
        self.bar: tqdm | None = None
        self.started = self.shown = 0.0
        self.first: int | None = None
        self.note = ""

    def show(self, done: int, total: int, note: str = "") -> None:
        """Show what is done and what is left. The first call says where it begins."""
        now = time.monotonic()
        if self.first is None:
            self.first, self.started = done, now
            if (self.console.is_terminal or self.console.is_jupyter) and not self.console.quiet:
                place = {"initial": done, "total": total}
                self.bar = tqdm(desc=self.label, **place, file=self.console.file, dynamic_ncols=True)
        elif self.bar is not None:
            self.bar.update(done - self.bar.n)
            if note and note != self.note:
                self.bar.set_description(note)
                self.note = note
        elif now - self.shown >= self.every or done == total:
            self.shown = now
            left = round((now - self.started) / max(1, done - self.first) * (total - done))
            parts = [f"{self.label} {done}/{total}", *([note] if note else []), f"{left // 60}:{left % 60:02} left"]
            self.console.print(" · ".join(parts), highlight=False)

    def close(self) -> None:
        """Take the bar off the terminal; harmless where there is none."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None


@contextmanager
def counting(label: str, console: Console) -> Iterator[Callable[[int, int], None]]:
    """Give a function to call with (items done, items in all), at the start too."""
    progress = Progress(label, console)
    try:
        yield progress.show
    finally:
        progress.close()
