"""What a confined program has on the disk, its hidden files included, and whether the disk has room
for it.

A file without a name lives on while it is open or mapped. So files are counted by their inode: by
name, then among the open ones, then among the mapped ones. That order misses none, since a program
can only go that way: it has no call that gives an open file a name, or that opens a mapped one.

A limit is looked at some twenty times a second, which is as long as a program may be over it.
"""

import contextlib
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from svdtune.errors import SvdtuneError

MAX_FILES = 256
TOO_MUCH = "wrote more than"  # how the reason of a program begins that did
LOOK = 0.05  # seconds between looks at the clock, the scratch folders and the disk


def over(scratches: Sequence[Path], pids: Sequence[int], limit: int) -> str:
    """Why what programs wrote is too much; empty where it is not.

    Args:
        scratches: the folder of each program, the only one that it writes in.
        pids: their processes.
        limit: bytes of the files of each, together.
    """
    for scratch, pid in zip(scratches, pids, strict=True):
        files = dict(_files(scratch, pid))
        if sum(files.values()) > limit or len(files) > MAX_FILES:
            return f"{TOO_MUCH} {limit} bytes or {MAX_FILES} files"
        if _hides_mapped(scratch, pid):
            return f"{TOO_MUCH} can be seen: to a file without a name, which it has mapped and closed"
    return ""


def _files(scratch: Path, pid: int) -> Iterator[tuple[tuple[int, int], int]]:
    """(device, inode) and size of each file in a folder, and of those that a process has open
    there."""
    inside = os.stat(scratch).st_dev
    for entry in os.scandir(scratch):
        with contextlib.suppress(FileNotFoundError):
            found = entry.stat(follow_symlinks=False)
            yield (found.st_dev, found.st_ino), found.st_size
    for link in _listed(Path(f"/proc/{pid}/fd")):
        with contextlib.suppress(OSError):  # it was closed meanwhile
            if os.readlink(link).startswith(f"{scratch}/"):
                found = os.stat(link)
                if found.st_dev == inside:
                    yield (found.st_dev, found.st_ino), found.st_size


def _hides_mapped(scratch: Path, pid: int) -> bool:
    """Whether a file of a folder is mapped that has no name and is not open."""
    try:
        maps = Path(f"/proc/{pid}/maps").read_text(errors="replace")
    except OSError:  # it has ended
        return False
    lines = (line.split(maxsplit=5) for line in maps.splitlines())
    mapped = {
        int(parts[4])
        for parts in lines
        if len(parts) == 6 and parts[5].startswith(f"{scratch}/") and parts[5].endswith(" (deleted)")
    }
    # open ones are counted by their size
    return bool(mapped - {inode for (_, inode), _ in _files(scratch, pid)}) if mapped else False


def _listed(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:  # the process has ended, or this system has no /proc
        return []


def sees_open_files(pid: int) -> bool:
    """Whether this system shows which files a process has open."""
    return bool(_listed(Path(f"/proc/{pid}/fd")))


def has_room(folder: Path, needed: int) -> bool:
    """Whether so many bytes are free where a folder lies."""
    return shutil.disk_usage(folder).free >= needed


def wait_for_room(folder: Path, needed: int, seconds: float) -> None:
    """Wait until there is room: what fills the disk may be another program, which ends soon.

    Raises:
        SvdtuneError: there is none after so many seconds.
    """
    deadline = time.monotonic() + seconds
    while not has_room(folder, needed):
        if time.monotonic() > deadline:
            raise SvdtuneError(
                f"{folder} has no room for a program's files: expected {needed / 1e6:.0f} MB; make room, or name another "
                "folder in TMPDIR. The same command goes on where it stopped"
            )
        time.sleep(LOOK)
