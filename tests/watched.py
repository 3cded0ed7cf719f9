"""A checkpoint that tells how many of its weights are in memory at once."""

import weakref
from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from svdtune.checkpoint import Checkpoint


class Watched:
    """Readers that hand out weights which tell when they are gone.

    Attributes:
        checkpoint: with these readers.
        read: how many weights were read.
        most: how many of those before were there when one was read, at most.
    """

    def __init__(self, checkpoint: Checkpoint):
        readers = {name: self._watching(reader) for name, reader in checkpoint.readers.items()}
        self.checkpoint = replace(checkpoint, readers=readers)
        self.most = 0
        self._alive: list[weakref.ref] = []

    @property
    def read(self) -> int:
        return len(self._alive)

    def _watching(self, reader: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def read() -> Tensor:
            tensor = reader()
            self.most = max(self.most, sum(ref() is not None for ref in self._alive))
            self._alive.append(weakref.ref(tensor.untyped_storage()))
            return tensor

        return read
