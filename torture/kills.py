"""Training stopped at random points, with SIGKILL and sometimes Ctrl-C, and gone on with until it
is finished."""

import random
import shutil
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path

from svdtune.training.checkpoints import latest_checkpoint, step_of
from svdtune.training.folder import RECIPE
from torture.world import call, is_interrupted, result_of, start, wait, write_recipe


@dataclass
class Kills:
    """What was stopped, and what came of it."""

    kills: int = 0
    interrupts: int = 0
    runs: int = 0
    resumes: int = 0
    after_steps: list[int] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


def stop_at_random(work: Path, model: Path, wanted: int, chance: random.Random, deadline: float) -> Kills:
    """Stop runs `wanted` times, or until the deadline; each is finished and compared with one that
    was left alone."""
    printed, found = work / "printed", Kills()
    whole = work / "whole"
    recipe = write_recipe(work / "whole.yaml", model, whole)
    began = time.monotonic()
    done = call(["train", recipe], printed)
    if done.code:
        raise RuntimeError(f"training does not work at all: {done.printed}")
    usual, expected = time.monotonic() - began, result_of(whole)
    while found.kills + found.interrupts < wanted and time.monotonic() < deadline:
        run = work / "stopped"
        shutil.rmtree(run, ignore_errors=True)
        recipe = write_recipe(work / "stopped.yaml", model, run)
        found.runs += 1
        if not _one_run(recipe, run, printed, usual, chance, found, wanted):
            continue
        (log, weights), (expected_log, expected_weights) = result_of(run), expected
        if log != expected_log:
            lines = [f"{line} and not {other}" for line, other in zip(log, expected_log, strict=False) if line != other]
            found.wrong.append(f"run {found.runs}: another log, of {len(log)} lines: {'; '.join(lines[:1])}")
        if weights != expected_weights:
            found.wrong.append(f"run {found.runs}: another adapter than the run that was not stopped")
    return found


def _one_run(
    recipe: Path, run: Path, printed: Path, usual: float, chance: random.Random, found: Kills, wanted: int
) -> bool:
    """Stop one run again and again until it is finished; whether it got there."""
    reached = -1
    while True:
        kept, _ = latest_checkpoint(run)
        step = step_of(kept) if kept else -1
        if step < reached:
            found.wrong.append(f"run {found.runs}: checkpoint {reached} is gone, {step} is the latest")
        reached = max(reached, step)
        flags = ["--resume"] if kept else ["--overwrite"] if (run / RECIPE).is_file() else []
        found.resumes += bool(kept)
        stop = signal.SIGINT if chance.random() < 0.25 else signal.SIGKILL
        left = found.kills + found.interrupts < wanted
        child = start(["train", recipe, *flags], printed)
        done = wait(child, printed, chance.uniform(0, 1.2 * usual) if left else None, stop)
        if done.code == 0:
            return True
        if done.code == -signal.SIGKILL:
            found.kills += 1
        elif is_interrupted(done):
            found.interrupts += 1
        else:
            found.wrong.append(f"run {found.runs}: {' '.join(flags)} ended with {done.code}: {done.printed[-400:]}")
            return False
        found.after_steps.append(reached)
