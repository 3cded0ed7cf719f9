"""Samples: the adapter of each sample of a batch, PEFT's `model(..., adapter_names=[...])`."""

from typing import Any

import torch
from torch import Tensor, nn

from svdtune.errors import SvdtuneError

BASE = "__base__"
"""PEFT's name for no adapter."""


class Samples(list[str]):
    """The name of an adapter for each sample. It is a list, since PEFT's own modules read it too.

    Attributes:
        kept: by layer, what it made of the adapters for all its calls: nothing is trained between.
    """

    def __init__(self, names: list[str]):
        super().__init__(names)
        self.kept: dict[nn.Module, Any] = {}
        self._places: dict[torch.device, dict[str, Tensor]] = {}

    def check(self, x: Tensor) -> None:
        """Raise `SvdtuneError` unless x [N, ...] has as many samples."""
        if len(x) != len(self):
            raise SvdtuneError(
                f"`adapter_names` has {len(self)} names, and a layer was given {len(x)} samples. Give a name for each sample "
                "of the batch, '__base__' for none; generate repeats them for `num_beams` that is passed to it"
            )

    def places(self, device: torch.device) -> dict[str, Tensor]:
        """By adapter, the indices of its samples, on the device."""
        if device not in self._places:
            names = dict.fromkeys(self)
            found = {name: [i for i, other in enumerate(self) if other == name] for name in names}
            self._places[device] = {name: torch.tensor(where, device=device) for name, where in found.items()}
        return self._places[device]
