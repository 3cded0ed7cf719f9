"""One program at a time in a folder: two would mix what they write, or score what is just being
replaced.

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
    """Keep other programs out of a folder for a while. What this process holds already, it may use.

    Args:
        folder: of a run, of studies, or of answers; made where it is missing, and gone again if
            nothing came into it.
        verb: what is done there, for the message of others.

    Raises:
        SvdtuneError: another process is at work there; the message says which.
    """
    place = folder.expanduser().resolve()
    if place in _ours:
        yield
        return
    lock = FileLock(place / LOCK, blocking=False)
    try:
        place.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        if not (place / LOCK).exists():  # filelock waits where no file can be made, as in /proc
            raise SvdtuneError(f"cannot use {folder}: no file can be made there; name another output") from None
        raise SvdtuneError(_in_use(folder, place / HOLDER)) from None
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno not in _CANNOT:
            raise SvdtuneError(f"cannot use {folder}: {error.strerror}; name another output") from error
        yield
        return
    _ours.add(place)
    try:
        _write_holder(place / HOLDER, verb)
        yield
    finally:
        _ours.discard(place)
        _leave(place)
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


def _in_use(folder: Path, path: Path) -> str:
    holder: Any = None
    with contextlib.suppress(OSError, ValueError):
        holder = json.loads(path.read_text(encoding="utf-8"))
    who = "another process"
    if isinstance(holder, dict):
        who = f"`svdtune {holder.get('verb')}`, process {holder.get('pid')} on {holder.get('host')} since {holder.get('since')}"
    return f"{folder} is in use by {who}. Wait until that has ended, or end it, and start again"
