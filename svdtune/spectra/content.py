"""A key for the content of a weight, fast enough to compute at every start."""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

_CHUNK = 16 * 2**20


def content_key(weight: Tensor) -> str:
    """64 hex digits naming a weight by dtype, shape and every byte of it: a SHA-256 tree over 16
    MiB chunks.

    Chunks are hashed on several threads (hashlib lets go of the interpreter lock). A weight on a
    GPU is copied to the host a chunk at a time, so the same weight has the same key on every
    device.
    """
    flat = weight.detach().contiguous().flatten().view(torch.uint8)
    chunks = flat.split(_CHUNK)
    top = hashlib.sha256(f"{weight.dtype} {tuple(weight.shape)} ".encode())
    if len(chunks) == 1:
        top.update(_hash(chunks[0]))
    else:
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1, len(chunks))) as pool:
            for digest in pool.map(_hash, chunks):
                top.update(digest)
    return top.hexdigest()


def _hash(chunk: Tensor) -> bytes:
    return hashlib.sha256(chunk.cpu().numpy().data).digest()
