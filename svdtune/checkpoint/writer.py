"""Write a safetensors file one tensor at a time, whether or not the tensors' sizes are known
beforehand.

The header stands first and is written last. If a size is unknown, the header gets room for every
name, and spaces fill what is left, as the format allows. Numbers must lie at multiples of their
size, so a tensor that would shift the next one off is written at the end. If all sizes are known,
the file's layout is exactly the one that was asked for.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch
from torch import Tensor

from svdtune.checkpoint.tensors import NAMES, Stored
from svdtune.errors import SvdtuneError

_ALIGNMENT = 8
# Of a tensor's entry beside its name: a dtype, two dimensions and two offsets of at most 19 digits,
# brackets and quotes.
_ENTRY = 160
_BLOCK = 16 * 2**20


@dataclass(frozen=True)
class Computed:
    """A tensor of known dtype and shape that is computed when its turn comes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    compute: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes it will have."""
        return math.prod(self.shape) * self.dtype.itemsize


class TensorWriter:
    """A safetensors file that grows; use it in a `with` statement.

    Args:
        path: the file.
        tensors: all that it may hold by name, in order; None for one whose size is not known.
        metadata: the file's own.
    """

    def __init__(self, path: Path, tensors: Mapping[str, Stored | Computed | None], metadata: Mapping[str, str]):
        self._header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
        sized = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        self._in_order = len(sized) == len(tensors)
        if self._in_order:
            place, header = 0, dict(self._header)
            for name, tensor in sized.items():
                header[name] = _entry(tensor, place)
                place += tensor.nbytes
            room = len(_encoded(header))
        else:
            room = sum(len(json.dumps(name)) + _ENTRY for name in tensors) + len(json.dumps(metadata)) + _ENTRY
        self._room = math.ceil(room / _ALIGNMENT) * _ALIGNMENT
        self._place = 0
        self._waiting: dict[str, Tensor] = {}
        self._file = path.open("wb")
        self._file.seek(8 + self._room)

    def write(self, name: str, tensor: Tensor | Stored | Computed) -> None:
        """Append a tensor; a stored one is copied as bytes.

        Raises:
            SvdtuneError: the file of a stored one became shorter.
        """
        if isinstance(tensor, Computed):
            tensor = tensor.compute().to(tensor.dtype)
        if isinstance(tensor, Tensor) and tensor.nbytes % _ALIGNMENT and not self._in_order:
            self._waiting[name] = tensor.cpu().clone()
        else:
            self._append(name, tensor)

    def _append(self, name: str, tensor: Tensor | Stored) -> None:
        self._header[name] = _entry(tensor, self._place)
        self._place += tensor.nbytes
        if isinstance(tensor, Stored):
            _copy(tensor, self._file)
        else:
            values = tensor.detach().cpu().contiguous().flatten()
            self._file.write(values.view(torch.uint8).numpy().data)

    def __enter__(self) -> "TensorWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        with self._file:
            if kind is not None:
                return
            for name, tensor in sorted(self._waiting.items(), key=lambda item: -item[1].itemsize):
                self._append(name, tensor)
            self._file.seek(0)
            self._file.write(self._room.to_bytes(8, "little") + _encoded(self._header).ljust(self._room))


def _entry(tensor: Tensor | Stored | Computed, place: int) -> dict[str, Any]:
    dtype = tensor.dtype if isinstance(tensor, Stored) else NAMES[tensor.dtype]
    return {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [place, place + tensor.nbytes]}


def _encoded(header: Mapping[str, Any]) -> bytes:
    return json.dumps(header, separators=(",", ":")).encode()


def _copy(tensor: Stored, sink: BinaryIO) -> None:
    with tensor.file.open("rb") as source:
        source.seek(tensor.start)
        left = tensor.nbytes
        while left:
            block = source.read(min(left, _BLOCK))
            if not block:
                raise SvdtuneError(f"{tensor.file} became shorter while it was read")
            sink.write(block)
            left -= len(block)
