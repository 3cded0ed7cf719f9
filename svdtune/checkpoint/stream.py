"""Write a safetensors file tensor by tensor where their number is known beforehand and their sizes are not.

The header, which stands first, gets room for every name and is written last; what it does not fill are spaces, as the format
allows. Numbers must lie at multiples of their size, so a tensor whose bytes would shift the next off that waits for the end.
"""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from svdtune.checkpoint.tensors import NAMES

_ALIGNMENT = 8
# Of a tensor's entry beside its name: a dtype, two dimensions and two offsets of at most 19 digits, brackets and quotes.
_ENTRY = 160


class TensorStream:
    """A safetensors file that grows; use it in a `with` statement.

    Args:
        path: the file.
        names: of all tensors that it may hold.
        metadata: the file's own.
    """

    def __init__(self, path: Path, names: Iterable[str], metadata: dict[str, str]):
        self._header: dict[str, Any] = {"__metadata__": metadata}
        room = sum(len(json.dumps(name)) + _ENTRY for name in names) + len(json.dumps(metadata)) + _ENTRY
        self._room = math.ceil(room / _ALIGNMENT) * _ALIGNMENT
        self._place = 0
        self._waiting: dict[str, Tensor] = {}
        self._file = path.open("wb")
        self._file.seek(8 + self._room)

    def write(self, name: str, tensor: Tensor) -> None:
        """Append a tensor."""
        if tensor.nbytes % _ALIGNMENT:
            self._waiting[name] = tensor.cpu().clone()
        else:
            self._append(name, tensor)

    def _append(self, name: str, tensor: Tensor) -> None:
        tensor = tensor.detach().cpu().contiguous()
        end = self._place + tensor.nbytes
        self._header[name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [self._place, end],
        }
        self._file.write(memoryview(tensor.flatten().view(torch.uint8).numpy()))
        self._place = end

    def __enter__(self) -> "TensorStream":
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        with self._file:
            if kind is not None:
                return
            for name, tensor in sorted(self._waiting.items(), key=lambda item: -item[1].itemsize):
                self._append(name, tensor)
            text = json.dumps(self._header, separators=(",", ":")).encode()
            self._file.seek(0)
            self._file.write(self._room.to_bytes(8, "little") + text.ljust(self._room))
