"""The decompositions of one start, shared out among the processes of a distributed run.

Each process does its part, and all get the results. So every process has the same ranks and, bit
for bit, the same factors with the same signs. Each weight is decomposed once, and one process
writes its entry in the disk cache.

A weight that one process cannot read alone is handled in rounds, one weight for each process. If it
is spread over processes, all of them put it together; if the main process alone has it, it is sent.
So no process holds more than one.

Every process must take part. SVDTUNE_SHARED_INIT=off switches sharing off, for programs that adapt
a model in some processes alone.
"""

import math
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from svdtune import processes
from svdtune.linalg import Factors
from svdtune.spectra.decompose import Weights

Shapes = Mapping[str, tuple[int, int]]
Result = TypeVar("Result")


def is_on() -> bool:
    """Whether there are other processes to share with."""
    return processes.count() > 1 and os.environ.get("SVDTUNE_SHARED_INIT", "").strip().lower() != "off"


def has_weights(model: nn.Module) -> bool:
    """Whether this process has a model's weights. Transformers loads quantized ones in every
    process, whatever is set."""
    loads = not processes.main_alone_loads() or getattr(model, "is_quantized", False)
    return loads or os.environ.get("LOCAL_RANK", "0") == "0"


class Sharing:
    """The division of some weights among the processes.

    Args:
        shapes: (out, in) of each weight, by name; the same in every process.
        weights: functions that read them.
        spread: whether a weight is put together by all processes that call its function.
        present: whether this process has the weights (or its part of them).
        devices: where to put factors that another process found, by name.
    """

    def __init__(
        self,
        shapes: Shapes,
        weights: Mapping[str, Callable[[], Tensor]],
        spread: bool,
        present: bool,
        devices: Mapping[str, torch.device],
    ):
        self.shapes, self.weights, self.spread, self.devices = shapes, weights, spread, devices
        self.present = present
        self.main_only = not all(processes.gather(present))
        # A weight costs what its Gram matrix does. In rounds, alike ones meet.
        self.order = sorted(shapes, key=lambda name: -math.prod(shapes[name]) * min(shapes[name]))
        if spread or self.main_only:
            self.owner = {name: place % processes.count() for place, name in enumerate(self.order)}
        else:
            self.owner = self._balanced()

    def _balanced(self) -> dict[str, int]:
        """The costliest first, each to whoever has least to do."""
        loads = [0.0] * processes.count()
        owner = {}
        for name in self.order:
            owner[name] = min(range(len(loads)), key=loads.__getitem__)
            loads[owner[name]] += math.prod(self.shapes[name]) * min(self.shapes[name])
        return owner

    def numbers(self, compute: Callable[[Weights], Mapping[str, Result]]) -> dict[str, Result]:
        """compute() over all weights, each done by one process; small results (they are pickled).

        Raises:
            SvdtuneError: in every process, if one fails.
        """
        return self._told(processes.jointly(lambda: self._own(compute)))

    def factors(
        self, compute: Callable[[Weights], Iterable[tuple[str, Factors]]]
    ) -> tuple[dict[str, int], dict[str, Factors]]:
        """compute() over all weights, each done by one process: how many factors each has, and the
        factors.

        A process without the model's weights gets the numbers alone.

        Raises:
            SvdtuneError: in every process, if one fails.
        """
        own = processes.jointly(lambda: self._own(compute))
        ranks = self._told({name: len(factors.s) for name, factors in own.items()})
        found = {}
        for name in self.shapes:
            sent = self._sent(name, own.pop(name, None), ranks[name])
            if self.present:
                found[name] = sent
        return ranks, found

    def _told(self, own: Mapping[str, Result]) -> dict[str, Result]:
        told = processes.gather(own)
        return {name: told[self.owner[name]][name] for name in self.shapes}

    def _own(self, compute: Callable[[Weights], Any]) -> dict[str, Any]:
        """The results of this process's part."""
        if not (self.spread or self.main_only):
            mine = [name for name in self.shapes if self.owner[name] == processes.index()]
            return dict(compute({name: self.weights[name] for name in mine}))
        found: dict[str, Any] = {}
        failed: Exception | None = None
        for start in range(0, len(self.order), processes.count()):
            held: dict[str, Tensor] = {}
            for name in self.order[start : start + processes.count()]:
                matrix = self.weights[name]() if self.spread else self._handed(name)
                if self.owner[name] == processes.index():
                    assert matrix is not None  # its owner was handed it
                    held[name] = _on_accelerator(matrix)
            try:
                found |= dict(compute(held)) if failed is None else {}
            # whatever it is, the others wait for this process in the rounds to come
            except Exception as error:
                failed = error
        if failed is not None:
            raise failed
        return found

    def _handed(self, name: str) -> Tensor | None:
        """A weight that only the main process has, in the process that is to decompose it."""
        matrix = processes.jointly(lambda: self.weights[name]() if processes.is_main() else None)
        dtype = processes.from_main(None if matrix is None else matrix.dtype)
        if self.owner[name] == 0:
            return matrix
        if processes.is_main():
            assert matrix is not None  # the main process has read it
            dist.send(matrix.contiguous().to(processes.device()), self.owner[name])
        elif self.owner[name] == processes.index():
            matrix = torch.empty(self.shapes[name], dtype=dtype, device=processes.device())
            dist.recv(matrix, 0)
            return matrix
        return None

    def _sent(self, name: str, own: Factors | None, k: int) -> Factors:
        """One weight's k factors, from the process that found them, in every process: their very
        bytes."""
        out, inner = self.shapes[name]
        sizes = (out * k, k, k * inner)
        flat = (
            torch.empty(sum(sizes), dtype=torch.float32) if own is None else torch.cat([part.flatten() for part in own])
        )
        flat = flat.to(processes.device(self.devices[name]))
        dist.broadcast(flat, src=self.owner[name])
        U, s, Vh = (_apart(part, self.devices[name]) for part in flat.split(sizes))
        return Factors(U.view(out, k), s, Vh.view(k, inner))


def _on_accelerator(matrix: Tensor) -> Tensor:
    """A weight where it is decomposed fastest."""
    if not torch.accelerator.is_available():
        return matrix
    return matrix.to(processes.accelerator())


def _apart(part: Tensor, device: torch.device) -> Tensor:
    """A part of a buffer, copied, so that it does not keep the whole buffer in memory."""
    return part.clone() if part.device == device else part.to(device)
