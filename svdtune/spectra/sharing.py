"""The decompositions of one start, shared out among the processes of a distributed run.

Each process does its part, results go to all: every process has the same ranks and, bit for bit, the same factors with the
same signs, each weight was decomposed once, and its entry in the disk cache was written by one process.

Every process must take part. SVDTUNE_SHARED_INIT=off switches it off, for programs that adapt a model in some processes alone.
"""

import os
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from svdtune import processes
from svdtune.linalg import Factors

Shapes = Mapping[str, tuple[int, int]]
Result = TypeVar("Result")


def is_on() -> bool:
    """Whether there are other processes to share with."""
    return processes.count() > 1 and os.environ.get("SVDTUNE_SHARED_INIT", "").strip().lower() != "off"


def has_weights() -> bool:
    """Whether this process has the model's weights: under FSDP's RAM-efficient loading only the first of each host does."""
    efficient = all(_says_yes(name) for name in ("ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING"))
    return not efficient or processes.count() == 1 or os.environ.get("LOCAL_RANK", "0") == "0"


def _says_yes(variable: str) -> bool:
    return os.environ.get(variable, "").strip().lower() in ("1", "true", "yes", "on", "y", "t")


def owners(shapes: Shapes) -> dict[str, int]:
    """The process that decomposes each weight: the costliest first, each to whoever has least to do.

    The cost of a weight is that of its Gram matrix, out · in · min(out, in).
    """
    if not all(processes.gather(has_weights())):
        return dict.fromkeys(shapes, 0)
    costs = {name: out * inner * min(out, inner) for name, (out, inner) in shapes.items()}
    loads = [0.0] * processes.count()
    owner = {}
    for name in sorted(costs, key=costs.__getitem__, reverse=True):
        owner[name] = min(range(len(loads)), key=loads.__getitem__)
        loads[owner[name]] += costs[name]
    return owner


def share(shapes: Shapes, compute: Callable[[list[str]], Mapping[str, Result]]) -> dict[str, Result]:
    """compute() over all names, each done by one process; small results (they are pickled).

    Args:
        shapes: (out, in) of each weight, by name; the same in every process.
        compute: from some of the names to their results.

    Raises:
        SvdtuneError: in every process, if one fails.
    """
    if not is_on():
        return dict(compute(list(shapes)))
    owner = owners(shapes)
    own = [name for name in shapes if owner[name] == processes.index()]
    found = processes.jointly(lambda: dict(compute(own)))
    told = processes.gather(found)
    return {name: told[owner[name]][name] for name in shapes}


def share_factors(
    shapes: Shapes,
    compute: Callable[[list[str]], Iterable[tuple[str, Factors]]],
    devices: Mapping[str, torch.device],
) -> tuple[dict[str, int], dict[str, Factors]]:
    """compute() over all names, each done by one process: how many factors each has, and the factors.

    A process without the model's weights gets the numbers alone.

    Args:
        shapes: (out, in) of each weight, by name; the same in every process.
        compute: from some of the names to their factors.
        devices: where to put the factors that other processes found, by name.

    Raises:
        SvdtuneError: in every process, if one fails.
    """
    if not is_on():
        found = dict(compute(list(shapes)))
        return {name: len(factors.s) for name, factors in found.items()}, found
    own: dict[str, Factors] = {}

    def counted(names: list[str]) -> dict[str, int]:
        own.update(compute(names))
        return {name: len(factors.s) for name, factors in own.items()}

    ranks = share(shapes, counted)
    if not all(processes.gather(has_weights())):
        return ranks, own
    owner = owners(shapes)
    return ranks, {
        name: _sent(own.pop(name, None), shape, ranks[name], owner[name], devices[name])
        for name, shape in shapes.items()
    }


def _sent(own: Factors | None, shape: tuple[int, int], k: int, owner: int, device: torch.device) -> Factors:
    """One weight's k factors, from the process that found them, in every process: their very bytes."""
    out, inner = shape
    sizes = (out * k, k, k * inner)
    if own is None:
        flat = torch.empty(sum(sizes), device=processes.device())
    else:
        flat = torch.cat([part.flatten() for part in own]).to(processes.device())
    dist.broadcast(flat, src=owner)
    if own is not None:
        return own
    U, s, Vh = (_apart(part, device) for part in flat.split(sizes))
    return Factors(U.view(out, k), s, Vh.view(k, inner))


def _apart(part: Tensor, device: torch.device) -> Tensor:
    """A part of a buffer in memory of its own, so that it does not keep the whole."""
    return part.clone() if part.device == device else part.to(device)
