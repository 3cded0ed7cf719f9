"""One program at a time in a run folder or at a file: two would mix what they write, or score what
is just being replaced.

The lock is the operating system's, so it goes with the process that holds it, however that ends.
"""

import contextlib
import datetime
import errno
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from svdtune.errors import SvdtuneError

LOCK, HOLDER = ".svdtune.lock", ".svdtune.holder"
_ours: set[Path] = set()
# Where nothing can be written, nothing can be mixed either; some network drives know no locks.
_CANNOT = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS)


@contextmanager
def held(folder: Path, verb: str) -> Iterator[None]:
    """Keep other programs out of a run folder for a while. What this process holds already, it may
    use.

    Args:
        folder: of a run; made where it is missing, and gone again if nothing came into it.
        verb: what is done there, for the message of others.

    Raises:
        SvdtuneError: another process is at work there; the message says which.
    """
    place = folder.expanduser().resolve()
    if place in _ours:
        yield
        return
    with _locked(place / LOCK, place / HOLDER, f"the run {folder}", verb):
        _ours.add(place)
        try:
            yield
        finally:
            _ours.discard(place)
            _leave(place)


@contextmanager
def held_file(path: Path, verb: str) -> Iterator[None]:
    """Keep other programs from writing a file for a while, which is there when the work is done.

    The lock stays beside an unfinished file: who waited for it and who came later then hold the
    same one.

    Raises:
        SvdtuneError: another process is writing it; the message says which.
    """
    place = path.expanduser().resolve()
    lock, holder = (place.with_name(f"{place.name}.part{ending}") for ending in (LOCK, HOLDER))
    with _locked(lock, holder, f"the file {path}", verb):
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                holder.unlink(missing_ok=True)
                if place.exists():
                    lock.unlink(missing_ok=True)


@contextmanager
def _locked(path: Path, holder: Path, what: str, verb: str) -> Iterator[None]:
    """Hold a lock, and say beside it who does."""
    lock = FileLock(path, blocking=False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        if not path.exists():  # filelock waits where no file can be made, as in /proc
            raise SvdtuneError(f"cannot use {what}: no file can be made beside it; name another output") from None
        raise SvdtuneError(_in_use(what, holder)) from None
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno not in _CANNOT:
            raise SvdtuneError(f"cannot use {what}: {error.strerror}; name another output") from error
        yield
        return
    try:
        _write_holder(holder, verb)
        yield
    finally:
        lock.release()


def is_empty(folder: Path) -> bool:
    """Whether a folder holds nothing but a lock."""
    return all(path.name in (LOCK, HOLDER) for path in folder.iterdir())


def _write_holder(path: Path, verb: str) -> None:
    now = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
    holder = {"verb": verb, "pid": os.getpid(), "host": socket.gethostname(), "since": now}
    with contextlib.suppress(OSError):  # it only makes the message better
        path.write_text(json.dumps(holder), encoding="utf-8")


def _leave(place: Path) -> None:
    """Forget who held the folder, and a folder that nothing came into."""
    with contextlib.suppress(OSError):
        (place / HOLDER).unlink(missing_ok=True)
        if is_empty(place):
            (place / LOCK).unlink(missing_ok=True)
            place.rmdir()


def _in_use(what: str, path: Path) -> str:
    holder: Any = None
    with contextlib.suppress(OSError, ValueError):
        holder = json.loads(path.read_text(encoding="utf-8"))
    who = "another process"
    if isinstance(holder, dict):
        who = f"`svdtune {holder.get('verb')}`, process {holder.get('pid')} on {holder.get('host')} since {holder.get('since')}"
    return f"{what} is in use by {who}. Wait until that has ended, or end it, and start again"
