"""The cache on disk: safetensors files under a key, written atomically, checked when read, bounded
in size.

Nothing here can make a computation fail or change its result: a file that cannot be read, is
damaged or was written by another version counts as absent, and a folder that cannot be written to
is reported once and then left alone.
"""

import hashlib
import json
import logging
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from svdtune.errors import SvdtuneError

log = logging.getLogger(__name__)

# Part of every file: raise it whenever an algorithm of svdtune.linalg or the layout of the files
# changes.
VERSION = "1"
# The subfolders; others may lie beside them.
KINDS = ("spectrum", "factors", "questions", "rows")
_SUFFIX = ".safetensors"
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


def load(kind: str, key: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """(tensors, facts) stored under a key, or None if they are not there in this version and
    undamaged."""
    path = _path(kind, key)
    if path is None:
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        facts = json.loads(metadata["facts"])
        if metadata["version"] != VERSION or metadata["key"] != key or metadata["digest"] != _digest(tensors, facts):
            raise ValueError("another version, another key, or damaged")
        os.utime(path)
    except FileNotFoundError:
        return None
    except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as error:
        log.debug("ignoring the cache file %s: %s", path, error)
        return None
    return tensors, facts


def store(kind: str, key: str, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Keep tensors and facts under a key; a failure to write is logged once and otherwise
    harmless."""
    path = _path(kind, key)
    if path is None:
        return
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {"version": VERSION, "key": key, "facts": json.dumps(facts), "digest": _digest(tensors, facts)}
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", suffix=".tmp", delete=False) as file:
            temporary = Path(file.name)
            file.write(save(tensors, metadata))
        # Atomic: a reader sees the old file, the new one or none, and of two writers one wins
        # whole.
        temporary.replace(path)
    except OSError as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        _report_once(path.parent, error)


def entries() -> Iterator[Entry]:
    """Every cached file, in no particular order."""
    folder = cache_dir()
    if folder is None:
        return
    for path in (path for kind in KINDS for path in folder.glob(f"{kind}/*{_SUFFIX}")):
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
            _report_once(entry.path.parent, error)
            break
        total -= entry.size
        removed.append(entry)
    return removed


def _path(kind: str, key: str) -> Path | None:
    folder = cache_dir()
    return None if folder is None else folder / kind / f"{key}{_SUFFIX}"


def _digest(tensors: dict[str, Tensor], facts: dict[str, Any]) -> str:
    """SHA-256 of facts and tensors: safetensors itself notices a truncated file but not a changed
    byte."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


_reported: set[Path] = set()


def _report_once(folder: Path, error: OSError) -> None:
    if folder not in _reported:
        _reported.add(folder)
        log.warning(
            "cannot write to the cache folder %s (%s): results are not remembered; "
            "set SVDTUNE_CACHE to another folder, or to off",
            folder,
            error,
        )
