"""Every verb that writes, stopped at random and called again: the second call ends well, with the
bytes of an undisturbed one.

After each stop the output is looked at first: it is whole, or it is not there.
"""

import hashlib
import json
import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from svdtune.cache import trim
from svdtune.spectra import store
from torture.world import Done, call, is_interrupted, start, start_call, wait


@dataclass
class Stops:
    """By verb how often it was stopped, how often at a moment when something had been written, and
    what did not hold."""

    stopped: Counter = field(default_factory=Counter)
    midway: Counter = field(default_factory=Counter)
    interrupts: int = 0
    wrong: list[str] = field(default_factory=list)

    @property
    def count(self) -> int:
        """Stops in all."""
        return sum(self.stopped.values())


@dataclass(frozen=True)
class Verb:
    """A command that writes into a folder.

    Attributes:
        words: the command, by the folder that it may write to.
        outputs: what it makes there, by name.
        at_once: whether each output appears whole; of `evaluate`, which keeps what is done, only
            the end counts.
    """

    words: Callable[[Path], list[str | Path]]
    outputs: tuple[str, ...]
    at_once: bool = True


def stop_verbs(work: Path, model: Path, run: Path, wanted: int, chance: random.Random, deadline: float) -> Stops:
    """Stop merge, export, plan, evaluate and writers of the cache `wanted` times in all, or until
    the deadline.

    Args:
        work: for what is written.
        model: the base model.
        run: a finished run of `write_recipe`'s.
        wanted: how many stops.
        chance: of the moments and signals.
        deadline: in seconds of `time.monotonic`.
    """
    verbs = {
        "merge": Verb(lambda at: ["merge", run, "--output", at / "merged"], ("merged",)),
        "export": Verb(lambda at: ["export", run, "--to", "lora", "--output", at / "lora"], ("lora",)),
        "plan": Verb(lambda at: ["plan", model, "--threshold", "0.2", "--json", at / "plan.json"], ("plan.json",)),
        "evaluate": Verb(_evaluate(run), ("answers",), at_once=False),
    }
    found, folder, printed = Stops(), work / "verbs", work / "printed"
    expected, usual = {}, {}
    for name, verb in verbs.items():
        began = time.monotonic()
        done = _fresh_and_call(folder, verb, printed)
        if done.code:
            raise RuntimeError(f"{name} does not work at all: {done.printed}")
        usual[name], expected[name] = time.monotonic() - began, _state(folder, verb)
    while found.count < wanted and time.monotonic() < deadline:
        for name, verb in verbs.items():
            _stop(name, verb, folder, printed, usual[name], expected[name], chance, found)
        _stop_the_cache(work / "written", printed, chance, found)
    return found


def _evaluate(run: Path) -> Callable[[Path], list[str | Path]]:
    small = ["--limit", "6", "--max-new-tokens", "4", "--batch-size", "2"]
    return lambda at: ["evaluate", run, "--data", "arithmetic", *small, "--output", at / "answers"]


def _fresh_and_call(folder: Path, verb: Verb, printed: Path) -> Done:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    with _own_cache(folder / "cache"):
        return call(verb.words(folder), printed)


def _stop(
    name: str,
    verb: Verb,
    folder: Path,
    printed: Path,
    usual: float,
    expected: dict,
    chance: random.Random,
    found: Stops,
) -> None:
    """Stop a verb until it ends by itself; each call goes on where the last was stopped."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for attempt in range(4):
        signal_to_send = signal.SIGINT if chance.random() < 0.3 else signal.SIGKILL
        after = chance.uniform(0, 1.1 * usual) if attempt < 3 else None
        with _own_cache(folder / "cache"):
            done = wait(start(verb.words(folder), printed), printed, after, signal_to_send)
        if done.code == -signal.SIGKILL or is_interrupted(done):
            found.stopped[name] += 1
            found.interrupts += done.code != -signal.SIGKILL
            found.midway[name] += any(path.name != "cache" for path in folder.iterdir())
            state = _state(folder, verb)
            if verb.at_once and any(state[output] not in (None, expected[output]) for output in verb.outputs):
                found.wrong.append(f"{name}: stopped, and something half done has the name of a result")
            if done.code != -signal.SIGKILL and list(folder.glob(".*.partial")) and verb.at_once:
                found.wrong.append(f"{name}: Ctrl-C left what killed calls alone may leave")
            _remove_partial(folder)
            # stopped between the result and the end: nothing is left to do
            if verb.at_once and state == expected:
                return
            continue
        if done.code or _state(folder, verb) != expected:
            found.wrong.append(f"{name}, called again after a stop: {done.code}: {done.printed[-400:]}")
        return


def _remove_partial(folder: Path) -> None:
    for left in folder.glob(".*.partial"):
        shutil.rmtree(left)


def _state(folder: Path, verb: Verb) -> dict[str, object]:
    """What a verb made, as digests, without the seconds that it took; None for what is not
    there."""
    return {output: _digest(folder / output) for output in verb.outputs}


def _digest(path: Path) -> object:
    if path.name == "result.json":
        return json.loads(path.read_text()) | {"seconds": 0}
    if path.is_file():
        return hashlib.sha256(path.read_bytes()).hexdigest()
    if not path.is_dir():
        return None
    return {str(file.relative_to(path)): _digest(file) for file in sorted(path.rglob("*")) if file.is_file()}


def _stop_the_cache(folder: Path, printed: Path, chance: random.Random, found: Stops) -> None:
    """Kill what does nothing but write cache files: what is there is what was written, or counts as
    absent."""
    shutil.rmtree(folder, ignore_errors=True)
    with _own_cache(folder):
        done = wait(start_call(_write_entries, printed), printed, chance.uniform(0, 0.05))
        if done.code != -signal.SIGKILL:
            found.wrong.append(f"writing the cache ended with {done.code}: {done.printed[-400:]}")
        found.stopped["cache"] += 1
        found.midway["cache"] += bool(list(folder.glob("*/.*.tmp")))
        for number in range(20):
            read = store.load("spectrum", f"key{number}")
            if read is not None and not torch.equal(read[0]["values"], _values(number)):
                found.wrong.append("a cache file is read as something else than was written")
        trim(0)
        if list(folder.glob("*/.*.tmp")):
            found.wrong.append("clearing the cache leaves what a killed writer left")


def _write_entries() -> None:
    while True:
        for number in range(20):
            store.store("spectrum", f"key{number}", {"values": _values(number)}, {"number": str(number)})


def _values(number: int) -> torch.Tensor:
    return torch.arange(200_000, dtype=torch.float32) + number


@contextmanager
def _own_cache(folder: Path) -> Iterator[None]:
    """`SVDTUNE_CACHE` names this folder inside the block."""
    before = os.environ["SVDTUNE_CACHE"]
    os.environ["SVDTUNE_CACHE"] = str(folder)
    try:
        yield
    finally:
        os.environ["SVDTUNE_CACHE"] = before
