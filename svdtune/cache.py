"""The cache folder: where it is, what it holds, and its bound.

Light to import, for `svdtune cache`; what is in the files is for `svdtune.spectra.store`.
"""

import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from svdtune.errors import SvdtuneError

log = logging.getLogger(__name__)

# The subfolders; others may lie beside them.
KINDS = ("spectrum", "factors", "questions", "rows")
SUFFIX = ".safetensors"
_DEFAULT_LIMIT_GB = 10.0
_UNITS = 1_000_000_000


class Entry(NamedTuple):
    """One cached file: its kind (of `KINDS`), key, size in bytes and time of last use in
    seconds."""

    kind: str
    key: str
    size: int
    used: float
    path: Path


def cache_dir() -> Path | None:
    """The cache folder: $SVDTUNE_CACHE, else $XDG_CACHE_HOME/svdtune, else ~/.cache/svdtune; None
    if switched "off"."""
    chosen = os.environ.get("SVDTUNE_CACHE", "")
    if chosen.strip().lower() == "off":
        return None
    if chosen:
        return Path(chosen).expanduser()
    return default_dir()


def default_dir() -> Path:
    """$XDG_CACHE_HOME/svdtune, else ~/.cache/svdtune."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "svdtune"


def cache_limit() -> int:
    """The most bytes the cache keeps: $SVDTUNE_CACHE_GB (10⁹ bytes), 10 unless set.

    Raises:
        SvdtuneError: the variable is not a number >= 0.
    """
    text = os.environ.get("SVDTUNE_CACHE_GB", "")
    try:
        limit = float(text) if text else _DEFAULT_LIMIT_GB
    except ValueError:
        limit = -1.0
    if not limit >= 0:
        raise SvdtuneError(
            f"SVDTUNE_CACHE_GB is {text!r}; it must be a number >= 0, the gigabytes that the cache may use"
        )
    return int(min(limit, 1e9) * _UNITS)


def entries() -> Iterator[Entry]:
    """Every cached file, in no particular order."""
    folder = cache_dir()
    if folder is None:
        return
    for path in (path for kind in KINDS for path in folder.glob(f"{kind}/*{SUFFIX}")):
        try:
            status = path.stat()
        except OSError:
            continue  # another process removed it
        yield Entry(path.parent.name, path.stem, status.st_size, status.st_mtime, path)


def trim(limit: int | None = None) -> list[Entry]:
    """Remove the files unused for longest until at most `limit` bytes remain; returns what was
    removed.

    Also removes what a killed writer left behind. `limit` defaults to `cache_limit()`; 0 clears the
    cache.
    """
    limit = cache_limit() if limit is None else limit
    folder = cache_dir()
    for leftover in [path for kind in KINDS for path in folder.glob(f"{kind}/.*.tmp")] if folder else []:
        try:
            if limit == 0 or time.time() - leftover.stat().st_mtime > 3600:
                leftover.unlink(missing_ok=True)
        except OSError:
            continue
    found = sorted(entries(), key=lambda entry: entry.used)
    total = sum(entry.size for entry in found)
    removed = []
    for entry in found:
        if total <= limit:
            break
        try:
            entry.path.unlink(missing_ok=True)
        except OSError as error:
            report_once(entry.path.parent, error)
            break
        total -= entry.size
        removed.append(entry)
    return removed


_reported: set[Path] = set()


def report_once(folder: Path, error: OSError) -> None:
    """Say in the log that a folder of the cache cannot be written to, once."""
    if folder not in _reported:
        _reported.add(folder)
        log.warning(
            "cannot write to the cache folder %s (%s): results are not remembered; "
            "set SVDTUNE_CACHE to another folder, or to off",
            folder,
            error,
        )
