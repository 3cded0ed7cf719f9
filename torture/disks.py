"""Every verb on a disk that is too small for it: one sentence, nothing half there, and the run goes
on once there is space."""

import os
import random
import resource
import shutil
import subprocess
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from svdtune.training.checkpoints import latest_checkpoint
from svdtune.training.folder import RECIPE
from torture.world import Done, call, is_one_sentence, result_of, write_recipe

# Bytes that each needs, roughly; a run has two checkpoints while it writes the second.
_NEEDED = {"train": 350_000, "merge": 170_000, "export": 60_000, "plan": 48_000}


@dataclass
class Disks:
    """How the disk was made small, what was tried on it, and what did not hold."""

    how: str
    tried: int = 0
    refused: int = 0
    resumed: int = 0
    wrong: list[str] = field(default_factory=list)


def fill(work: Path, model: Path, run: Path, count: int, chance: random.Random, deadline: float) -> Disks:
    """Run training, merge, export and plan on `count` disks of random sizes.

    Args:
        work: for what is written elsewhere.
        model: the base model.
        run: a finished run of `write_recipe`'s.
        count: how many disks.
        chance: of the sizes.
        deadline: in seconds of `time.monotonic`.
    """
    mounted = _can_mount(work)
    found = Disks("a tmpfs of limited size" if mounted else "a limit on the size of a file (no right to mount)")
    small = _mount if mounted else _limit
    verbs: dict[str, Callable[[Path], list[str | Path]]] = {
        "merge": lambda disk: ["merge", run, "--output", disk / "merged", "--no-check"],
        "export": lambda disk: ["export", run, "--to", "lora", "--output", disk / "lora"],
        "plan": lambda disk: ["plan", model, "--json", disk / "plan.json", "--chart", disk / "plan.svg"],
    }
    for number in range(count):
        if time.monotonic() > deadline:
            break
        name = ["train", *verbs][number % (1 + len(verbs))]
        size = int(_NEEDED[name] * chance.uniform(0.05, 1.1))
        with small(work / "disk", size) as disk:
            found.tried += 1
            if name == "train":
                _train(work, model, disk, run, small, found)
                continue
            done = call(verbs[name](disk), work / "printed")
            found.refused += done.code == 2
            if done.code != 0 and not is_one_sentence(done):
                found.wrong.append(f"{name} on {size} bytes: {done.code}: {done.printed[-400:]}")
            if done.code and any(path.name in ("merged", "lora") for path in disk.iterdir()):
                found.wrong.append(f"{name} on {size} bytes left a half result")
    return found


def _train(work: Path, model: Path, disk: Path, whole: Path, small: Callable, found: Disks) -> None:
    folder = disk / "run"
    recipe = write_recipe(work / "disk.yaml", model, folder)
    done: Done = call(["train", recipe], work / "printed")
    if done.code == 0:
        return
    found.refused += 1
    if not is_one_sentence(done):
        found.wrong.append(f"train: {done.code}: {done.printed[-400:]}")
        return
    # Elsewhere there is space: the run moves there and goes on.
    roomy = work / "roomy"
    shutil.rmtree(roomy, ignore_errors=True)
    if folder.is_dir():
        shutil.copytree(folder, roomy)
    recipe = write_recipe(work / "disk.yaml", model, roomy)
    kept, _ = latest_checkpoint(roomy)
    flags = ["--resume"] if kept else ["--overwrite"] if (roomy / RECIPE).is_file() else []
    found.resumed += bool(kept)
    if not flags:
        shutil.rmtree(roomy, ignore_errors=True)
    _unlimited()
    done = call(["train", recipe, *flags], work / "printed")
    if done.code or result_of(roomy) != result_of(whole):
        found.wrong.append(f"train went on to another result: {done.code}: {done.printed[-400:]}")


def read_only(work: Path, model: Path, run: Path) -> Disks:
    """Run every writing verb where nothing may be written: one sentence; and with a cache there,
    which only is not kept."""
    mounted = _can_mount(work)
    found = Disks("a tmpfs mounted read-only" if mounted else "a folder without the right to write")
    with (_mount if mounted else _plain)(work / "disk", 1 << 20) as disk:
        verbs: list[list[str | Path]] = [
            ["train", write_recipe(work / "disk.yaml", model, disk / "run")],
            ["evaluate", run, "--data", "arithmetic", "--limit", "1", "--output", disk / "answers"],
            ["merge", run, "--output", disk / "merged"],
            ["export", run, "--output", disk / "lora"],
            ["combine", run, run, "--output", disk / "combined"],
            ["plan", model, "--json", disk / "plan.json"],
            ["plan", model, "--chart", disk / "plan.svg"],
            ["report", run, "--output", disk / "report.html"],
        ]
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True) if mounted else disk.chmod(0o555)
        for words in verbs:
            done = call(words, work / "printed")
            found.tried += 1
            found.refused += is_one_sentence(done)
            if not is_one_sentence(done):
                found.wrong.append(f"{words[0]} on a read-only disk: {done.code}: {done.printed[-400:]}")
        before, os.environ["SVDTUNE_CACHE"] = os.environ["SVDTUNE_CACHE"], str(disk / "cache")
        done = call(["plan", model], work / "printed")
        os.environ["SVDTUNE_CACHE"] = before
        found.tried += 1
        if done.code:
            found.wrong.append(f"plan with a read-only cache: {done.code}: {done.printed[-400:]}")
    return found


@contextmanager
def _plain(place: Path, _: int):
    place.mkdir(exist_ok=True)
    yield place
    place.chmod(0o755)


@contextmanager
def _mount(place: Path, size: int):
    place.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


@contextmanager
def _limit(place: Path, size: int):
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    try:
        yield place
    finally:
        _unlimited()


def _unlimited() -> None:
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


def _can_mount(work: Path) -> bool:
    if os.geteuid() != 0:
        return False
    try:
        with _mount(work / "disk", 1 << 16):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False
