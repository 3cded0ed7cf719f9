"""The tensors of a safetensors file, each with the place of its bytes.

A safetensors file is the length of its header (8 bytes, little-endian), the header (JSON: a dtype,
a shape and two offsets by name) and the tensors' bytes. So a tensor that does not change can be
copied as bytes, and no file is ever held in memory.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from svdtune.errors import SvdtuneError

# safetensors' names of the dtypes that a model's weights are merged in.
NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
FLOATING = {name: dtype for dtype, name in NAMES.items()}


@dataclass(frozen=True)
class Stored:
    """A tensor in a file.

    Attributes:
        file: the file.
        name: of the tensor there.
        dtype: by safetensors' name.
        shape: its shape.
        start: place of its first byte in the file.
        nbytes: number of its bytes.
    """

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int

    def read(self, index: int | None = None) -> Tensor:
        """The tensor, or one entry of its first dimension. The file is opened for this alone, so
        memory holds nothing else of it.

        Raises:
            SvdtuneError: the file is gone or was changed.
        """
        try:
            with safe_open(self.file, framework="pt") as file:
                return file.get_tensor(self.name) if index is None else file.get_slice(self.name)[index : index + 1][0]
        except (OSError, SafetensorError) as error:
            raise SvdtuneError(
                f"{self.name} cannot be read from {self.file} ({error}); download the checkpoint again"
            ) from error


@dataclass(frozen=True)
class Shard:
    """A safetensors file of a model.

    Attributes:
        name: of the file, relative to the model's folder.
        tensors: by name, in the order of their bytes.
        metadata: the file's own.
    """

    name: str
    tensors: dict[str, Stored]
    metadata: dict[str, str]


def read_shard(folder: Path, name: str) -> Shard:
    """Read the header of a safetensors file.

    Raises:
        SvdtuneError: the file is missing or damaged.
    """
    path = folder / name
    try:
        with safe_open(path, framework="pt"):  # looks at the header and the file's length
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header: dict[str, Any] = json.loads(file.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        raise SvdtuneError(
            f"{path} is missing, cut short or damaged and cannot be read ({error}); download or copy it again"
        ) from error
    metadata = header.pop("__metadata__", {})
    tensors = {}
    for tensor, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        start, end = entry["data_offsets"]
        tensors[tensor] = Stored(path, tensor, entry["dtype"], tuple(entry["shape"]), 8 + length + start, end - start)
    return Shard(name, tensors, metadata)
