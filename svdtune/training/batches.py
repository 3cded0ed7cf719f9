"""Batches for several processes that hold, step by step, the rows that one process has with the
same global batch.

Where rows do not fill the last batches of an epoch, Accelerate gives rows from the epoch's start
once more. Here an empty row fills them up instead, one without labels: it adds nothing to the loss
and is counted by nobody.
"""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import DataLoader, Dataset

from svdtune.data.encoding import IGNORED

Row = dict[str, Any]


class FilledRows(Dataset[Row]):
    """Rows, and behind the last of them one that is empty."""

    def __init__(self, rows: Sequence[Row]):
        self.rows = rows
        self.empty: Row = {"input_ids": rows[0]["input_ids"][:1], "labels": [IGNORED]}

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __getitem__(self, index: int) -> Row:
        return self.empty if index == len(self.rows) else self.rows[index]


class FilledBatches:
    """A batch sampler's batches, filled up to whole ones, as many as `processes` divides."""

    def __init__(self, batches: Any, processes: int, empty: int):
        self.batches, self.processes, self.empty = batches, processes, empty
        self.batch_size, self.drop_last, self.sampler = batches.batch_size, False, batches.sampler

    def __len__(self) -> int:
        return -(-len(self.batches) // self.processes) * self.processes

    def __iter__(self) -> Iterator[list[int]]:
        batches = iter(self.batches)
        while group := list(islice(batches, self.processes)):
            for number in range(self.processes):
                batch = list(group[number]) if number < len(group) else []
                yield batch + [self.empty] * (self.batch_size - len(batch))


def fill_up(loader: DataLoader[Any]) -> None:
    """Make a loader that Accelerate shared out among processes end every epoch with empty rows."""
    shared = loader.batch_sampler
    if isinstance(shared, BatchSamplerShard) and isinstance(loader.dataset, FilledRows):
        shared.batch_sampler = FilledBatches(shared.batch_sampler, shared.num_processes, len(loader.dataset))
