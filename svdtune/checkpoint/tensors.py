"""A Transformers folder's safetensors files, read and written one tensor at a time.

A safetensors file is the length of its header (8 bytes, little-endian), the header (JSON: a dtype, a shape and two offsets by
name) and the tensors' bytes. So a tensor that does not change is copied as bytes, and no file is ever held in memory.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from svdtune.checkpoint.shards import shard_names
from svdtune.errors import SvdtuneError

# safetensors' names of the dtypes that a model's weights are merged in.
NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
FLOATING = {name: dtype for dtype, name in NAMES.items()}
_BLOCK = 16 * 2**20


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies: its file, dtype by safetensors' name, shape, and the place and number of its bytes."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int


@dataclass(frozen=True)
class Checkpoint:
    """The safetensors of a model folder.

    Attributes:
        folder: where they lie.
        shards: by file name, the tensors of the file in the order of their bytes.
        metadata: the files' own, by file name.
    """

    folder: Path
    shards: dict[str, dict[str, Stored]]
    metadata: dict[str, dict[str, str]]

    @property
    def tensors(self) -> dict[str, Stored]:
        """Every tensor by name."""
        return {name: stored for shard in self.shards.values() for name, stored in shard.items()}

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(stored.size for stored in self.tensors.values())

    def read(self, name: str) -> Tensor:
        """One tensor, in memory of its own."""
        with safe_open(self.tensors[name].file, framework="pt") as file:
            return file.get_tensor(name).clone()


def open_checkpoint(folder: Path) -> Checkpoint | None:
    """The safetensors that Transformers would load from a folder; None where it has none.

    Raises:
        SvdtuneError: a file is missing or damaged.
    """
    names = shard_names(folder)
    if names is None:
        return None
    shards, metadata = {}, {}
    for name in names:
        shards[name], metadata[name] = _header(folder / name)
    return Checkpoint(folder, shards, metadata)


def _header(path: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """The tensors of a file in the order of their bytes, and its metadata."""
    try:
        with safe_open(path, framework="pt"):  # looks at the header and the file's length
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header: dict[str, Any] = json.loads(file.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        raise SvdtuneError(f"{path} is missing, cut short or damaged ({error}); copy the model again") from error
    metadata = header.pop("__metadata__", {})
    found = {}
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        start, end = entry["data_offsets"]
        found[name] = Stored(path, entry["dtype"], tuple(entry["shape"]), 8 + length + start, end - start)
    return found, metadata


@dataclass(frozen=True)
class Computed:
    """A tensor to write that is computed when its turn comes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    compute: Callable[[], Tensor]

    @property
    def size(self) -> int:
        """Bytes it will have."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_tensors(path: Path, tensors: Mapping[str, Stored | Computed], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, one tensor in memory at a time and in the order given."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    place = 0
    for name, tensor in tensors.items():
        dtype = tensor.dtype if isinstance(tensor, Stored) else NAMES[tensor.dtype]
        header[name] = {
            "dtype": dtype,
            "shape": list(tensor.shape),
            "data_offsets": [place, place + tensor.size],
        }
        place += tensor.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            if isinstance(tensor, Stored):
                _copy(tensor, file)
            else:
                value = tensor.compute().to("cpu", tensor.dtype).contiguous()
                file.write(memoryview(value.flatten().view(torch.uint8).numpy()))


def _copy(tensor: Stored, sink: BinaryIO) -> None:
    with tensor.file.open("rb") as source:
        source.seek(tensor.start)
        left = tensor.size
        while left:
            block = source.read(min(left, _BLOCK))
            if not block:
                raise SvdtuneError(f"{tensor.file} became shorter while it was read")
            sink.write(block)
            left -= len(block)
