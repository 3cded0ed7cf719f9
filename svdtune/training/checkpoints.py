"""Checkpoints that are whole: sealed with the digest of every file once all of them are on the
disk.

Trainer writes a checkpoint file by file. A process that is killed leaves some of them, and a disk
may lose or change one later. Only a sealed checkpoint whose files are what was sealed is gone on
from; older ones are deleted after a newer one is sealed, never before.
"""

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from svdtune.errors import SvdtuneWarning
from svdtune.system import read_objects, replace_text

SEAL = "sealed.json"
PROCESSES = "processes.json"
# Trainer's pickle of its arguments, which nothing reads: the recipe says the same.
_UNUSED = "training_args.bin"


def checkpoint_folder(run: Path, step: int) -> Path:
    """Where the checkpoint of a step lies; the name is Trainer's."""
    return run / f"checkpoint-{step}"


class WrittenBy(NamedTuple):
    """How many processes wrote a checkpoint, and how many rows of data they took a step,
    together."""

    processes: int
    rows: int


def note_processes(checkpoint: Path, by: WrittenBy) -> None:
    """Note beside a checkpoint who wrote it."""
    replace_text(checkpoint / PROCESSES, json.dumps(by._asdict()) + "\n")


def written_by(checkpoint: Path) -> WrittenBy | None:
    """Who wrote a checkpoint, None where that was not noted yet."""
    path = checkpoint / PROCESSES
    return WrittenBy(**json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None


def step_of(checkpoint: Path) -> int:
    """The step after which a checkpoint was written."""
    return int(checkpoint.name.rpartition("-")[2])


def seal(checkpoint: Path) -> None:
    """Bring a checkpoint's files to the disk and write down their digests: from here on it counts.

    Reads every file once: about a second a gigabyte.
    """
    (checkpoint / _UNUSED).unlink(missing_ok=True)
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != SEAL)
    digests = {str(path.relative_to(checkpoint)): _digest(path, to_disk=True) for path in files}
    replace_text(checkpoint / SEAL, json.dumps(digests, indent=2) + "\n")


def fault(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, None if it is as it was sealed."""
    try:
        sealed = json.loads((checkpoint / SEAL).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return "it was not written to its end"
    except (OSError, ValueError):
        return f"its {SEAL} is damaged"
    if not isinstance(sealed, dict) or not sealed:
        return f"its {SEAL} is damaged"
    for name, digest in sealed.items():
        path = checkpoint / name
        if not path.is_file():
            return f"its {name} is missing"
        if _digest(path) != digest:
            return f"its {name} was altered"
    return None


def sealed_checkpoints(run: Path) -> dict[int, Path]:
    """By step, in order, the checkpoints that were written to their end; whether they still are
    whole is `fault`'s to say."""
    return {step: path for step, path in _numbered(run) if (path / SEAL).is_file()}


def latest_checkpoint(run: Path) -> tuple[Path | None, list[str]]:
    """The whole checkpoint with the most steps, and a sentence for every later one that is not
    whole."""
    skipped: list[str] = []
    for _, path in reversed(list(_numbered(run))):
        reason = fault(path)
        if reason is None:
            return path, skipped
        skipped.append(f"{path.name} is skipped: {reason}")
    return None, skipped


def keep_up_to(run: Path, step: int) -> None:
    """Delete checkpoints of later steps, which cannot be used and would be in the way."""
    for later, path in list(_numbered(run)):
        if later > step:
            discard(path)


def keep_steps(path: Path, step: int) -> None:
    """Take the lines of later steps out of a file of a run that has a JSON object a line: a resumed
    run takes those steps again.

    A damaged line goes too, with a warning, and so does one that names no step.
    """
    if not path.is_file():
        return
    told: list[str] = []
    lines = read_objects(path, told.append)
    dated = [line for line in lines if isinstance(line.get("step"), int)]
    if len(dated) < len(lines):
        told.append(f"{len(lines) - len(dated)} lines of {path.name} name no step and are left out")
    for message in told:
        warnings.warn(message, SvdtuneWarning, stacklevel=2)
    replace_text(path, "".join(json.dumps(line) + "\n" for line in dated if line["step"] <= step))


def keep_newest(run: Path, count: int, best: Path | None = None) -> None:
    """Delete all but the `count` sealed checkpoints of the most steps, and the best; also what is
    not sealed beside them."""
    kept = {path.name for path in list(sealed_checkpoints(run).values())[-count:]} | {best.name if best else ""}
    for _, path in list(_numbered(run)):
        if path.name not in kept:
            discard(path)


def discard(checkpoint: Path) -> None:
    """Delete a checkpoint, its seal first: half-deleted, it does not count."""
    (checkpoint / SEAL).unlink(missing_ok=True)
    shutil.rmtree(checkpoint, ignore_errors=True)


def _numbered(run: Path) -> Iterator[tuple[int, Path]]:
    found = [(re.fullmatch(r"checkpoint-(\d{1,12})", path.name), path) for path in run.glob("checkpoint-*")]
    yield from sorted((int(match[1]), path) for match, path in found if match and path.is_dir())


def _digest(path: Path, to_disk: bool = False) -> str:
    with path.open("rb") as file:
        if to_disk:
            os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()
