"""The cache on disk: safetensors files under a key, written atomically and checked when read.

Nothing here can make a computation fail or change its result. A file that cannot be read, is
damaged or was written by another version counts as absent. A folder that cannot be written to is
reported once and then left alone.
"""

import hashlib
import json
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from svdtune.cache import SUFFIX, cache_dir, report_once

log = logging.getLogger(__name__)

# Part of every file: raise it whenever an algorithm of svdtune.linalg or the layout of the files
# changes.
VERSION = "1"


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
        report_once(path.parent, error)


def _path(kind: str, key: str) -> Path | None:
    folder = cache_dir()
    return None if folder is None else folder / kind / f"{key}{SUFFIX}"


def _digest(tensors: dict[str, Tensor], facts: dict[str, Any]) -> str:
    """SHA-256 of facts and tensors: safetensors itself notices a truncated file but not a changed
    byte."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
