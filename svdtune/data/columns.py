"""Encoded rows column by column: every token of a column in one array, in place of a Python list of
Python numbers for each row, which takes several times the memory."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Row = dict[str, Any]
_ENDS = ".ends"  # behind a column's name: where each of its rows ends


class Columns(Sequence[Row]):
    """Rows of lists of whole numbers, or of single ones; a row is made when it is asked for.

    Args:
        arrays: by the column's name, all tokens of it one row after another, int32; by that name
            and `.ends`, int64 of shape (rows,), where each row ends in them. A column without ends
            holds one truth value a row.
    """

    def __init__(self, arrays: Mapping[str, NDArray[Any]]):
        self.arrays = dict(arrays)
        self.names = [name for name in self.arrays if not name.endswith(_ENDS)]
        self._size = len(self.arrays.get(self.names[0] + _ENDS, self.arrays[self.names[0]])) if self.names else 0

    @classmethod
    def of(cls, rows: Sequence[Row]) -> "Columns":
        """The columns of rows that all have the same fields."""
        arrays: dict[str, NDArray[Any]] = {}
        for name in rows[0] if rows else ():
            values = [row[name] for row in rows]
            if isinstance(values[0], bool):
                arrays[name] = np.array(values, dtype=np.bool_)
                continue
            arrays[name] = np.fromiter(chain.from_iterable(values), dtype=np.int32)
            arrays[name + _ENDS] = np.cumsum([len(value) for value in values], dtype=np.int64)
        return cls(arrays)

    @classmethod
    def join(cls, parts: Iterable["Columns"]) -> "Columns":
        """The rows of all parts, one part after another."""
        filled = [part for part in parts if len(part)]
        if not filled:
            return cls({})
        arrays = {name: np.concatenate([part.arrays[name] for part in filled]) for name in filled[0].names}
        for name in filled[0].names:
            if filled[0].is_list(name):
                arrays[name + _ENDS] = np.cumsum(np.concatenate([part.lengths(name) for part in filled]))
        return cls(arrays)

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor]) -> "Columns":
        """What `to_tensors` gave."""
        return cls({name: tensor.numpy() for name, tensor in tensors.items()})

    def to_tensors(self) -> dict[str, Tensor]:
        """The arrays as tensors that share their memory."""
        return {name: torch.from_numpy(array) for name, array in self.arrays.items()}

    @classmethod
    def of_arrow(cls, table: Any) -> "Columns":
        """The columns of an Arrow table of lists of numbers."""
        arrays: dict[str, NDArray[Any]] = {}
        for name in table.column_names:
            column = table.column(name)
            chunks = column.chunks
            arrays[name] = np.concatenate([chunk.flatten().to_numpy() for chunk in chunks]).astype(np.int32)
            lengths = [np.diff(chunk.offsets.to_numpy()) for chunk in chunks]
            arrays[name + _ENDS] = np.cumsum(np.concatenate(lengths), dtype=np.int64)
        return cls(arrays)

    def to_arrow(self) -> Any:
        """The lists as an Arrow table, which `datasets` works on."""
        import pyarrow as pa

        starts = {name: np.concatenate([[0], self.arrays[name + _ENDS]]) for name in self.names}
        return pa.table(
            {
                name: pa.LargeListArray.from_arrays(pa.array(starts[name]), pa.array(self.arrays[name]))
                for name in starts
            }
        )

    def is_list(self, name: str) -> bool:
        """Whether a column holds a list a row."""
        return name + _ENDS in self.arrays

    def lengths(self, name: str) -> NDArray[np.int64]:
        """How long each row's list in a column is, of shape (rows,)."""
        return np.diff(self.arrays[name + _ENDS], prepend=0)

    def sizes(self) -> NDArray[np.int64]:
        """How many tokens each row has, of shape (rows,): each counted once, not again as a
        label."""
        lists = [self.lengths(name) for name in self.names if self.is_list(name) and name != "labels"]
        return np.sum(lists, axis=0, dtype=np.int64) if lists else np.zeros(0, dtype=np.int64)

    def take(self, order: Sequence[int]) -> "Columns":
        """The rows at these places, in this order."""
        places = np.asarray(order, dtype=np.int64)
        arrays: dict[str, NDArray[Any]] = {}
        for name in self.names if len(places) else ():
            if not self.is_list(name):
                arrays[name] = self.arrays[name][places]
                continue
            lengths, ends = self.lengths(name)[places], self.arrays[name + _ENDS][places]
            slices = zip(ends - lengths, ends, strict=True)
            arrays[name] = np.concatenate([self.arrays[name][start:end] for start, end in slices])
            arrays[name + _ENDS] = np.cumsum(lengths)
        return Columns(arrays)

    def __len__(self) -> int:
        return self._size

    @overload
    def __getitem__(self, at: int) -> Row: ...

    @overload
    def __getitem__(self, at: slice) -> list[Row]: ...

    def __getitem__(self, at: int | slice) -> Row | list[Row]:
        if isinstance(at, slice):
            return [self[index] for index in range(*at.indices(len(self)))]
        if not -len(self) <= at < len(self):
            raise IndexError(f"there is no row {at}: there are {len(self)}")
        return {name: self._value(name, at % len(self)) for name in self.names}

    def _value(self, name: str, at: int) -> Any:
        if not self.is_list(name):
            return self.arrays[name][at].item()
        ends = self.arrays[name + _ENDS]
        return self.arrays[name][ends[at - 1] if at else 0 : ends[at]].tolist()
