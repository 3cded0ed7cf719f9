"""SORSA's factors where FSDP2 spread their rows over processes: Gram matrices from what each
process holds.

    UᵀU = Σ_p U_pᵀ U_p      U_p [out / n, r], the rows of process p

The sum is all that has to be sent, r² numbers a factor, all factors at once; rows of the gradient 2
U_p E / ‖E‖ follow from it.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from svdtune.errors import SvdtuneError
from svdtune.methods.compute.gram import gram

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

FactorT = TypeVar("FactorT", bound=Tensor)

# Factors of one rank are copied one under the other and treated together; so many elements bound
# the copies: 128 MiB in fp32, 256 in fp64.
CHUNK_ELEMENTS = 1 << 25


def is_sharded(tensor: Tensor) -> "TypeGuard[DTensor]":
    """Whether a tensor is a DTensor. A torch without distributed training may lack that class, so
    it is not imported for this."""
    return hasattr(tensor, "to_local")


def rows(factor: Tensor) -> Tensor:
    """The rows of a factor that this process holds. Unless the factor is sharded these are all."""
    return factor.to_local() if is_sharded(factor) else factor


def batches(factors: Iterable[FactorT], grams: Mapping[int, Tensor]) -> Iterator[tuple[list[FactorT], Tensor | None]]:
    """Factors that can be treated together: of one rank, dtype and device, the short ones first, as
    many as CHUNK_ELEMENTS allows and at least one.

    Beside each list stands MᵀM [n, r, r] of the whole factors if these are sharded, from `grams`
    (`summed_grams`), else None.
    """
    kinds: dict[tuple[Any, ...], list[FactorT]] = defaultdict(list)
    for factor in factors:
        kinds[factor.shape[1], factor.dtype, factor.device, id(factor) in grams].append(factor)
    for (_, _, _, sharded), alike in kinds.items():
        for chunk in _chunks(sorted(alike, key=lambda factor: factor.shape[0])):
            yield chunk, torch.stack([grams[id(factor)] for factor in chunk]) if sharded else None


def _chunks(factors: Iterable[FactorT]) -> Iterator[list[FactorT]]:
    """The factors in order, as many at a time as CHUNK_ELEMENTS allows, and at least one."""
    chunk: list[FactorT] = []
    elements = 0
    for factor in factors:
        size = rows(factor).numel()
        if chunk and elements + size > CHUNK_ELEMENTS:
            yield chunk
            chunk, elements = [], 0
        chunk.append(factor)
        elements += size
    yield chunk


def whole(tensor: Tensor) -> Tensor:
    """A tensor, put together if it is sharded. Every process must call it."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def as_gradient(own: Tensor, factor: Tensor) -> Tensor:
    """A gradient for a factor from that of its rows."""
    if not is_sharded(factor):
        return own
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        own, factor.device_mesh, factor.placements, run_check=False, shape=factor.shape, stride=factor.stride()
    )


@torch.no_grad()
def summed_grams(factors: Iterable[Tensor]) -> dict[int, Tensor]:
    """MᵀM [r, r] of every sharded factor, by its id, with one all-reduce for all. Empty if none is
    sharded.

    Raises:
        SvdtuneError: a factor is sharded otherwise than by rows.
    """
    by_groups: dict[tuple[Any, ...], list[DTensor]] = defaultdict(list)
    for factor in factors:
        if is_sharded(factor):
            by_groups[_spread_over(factor)].append(factor)
    found: dict[int, Tensor] = {}
    for groups, sharded in by_groups.items():
        found |= _sum_over(groups, sharded)
    return found


def _spread_over(factor: "DTensor") -> tuple[Any, ...]:
    """The groups of processes over which a factor's rows are spread."""
    groups = []
    for dimension, placement in enumerate(factor.placements):
        if placement.is_shard(0):
            groups.append(factor.device_mesh.get_group(dimension))
        elif not placement.is_replicate():
            raise SvdtuneError(
                f"SORSA's regularizer needs factors that are sharded by rows; one is {placement}. Leave `shard_placement_fn` "
                "of fully_shard alone for them, or set gamma=0"
            )
    return tuple(groups)


def _sum_over(groups: Sequence[Any], factors: list["DTensor"]) -> dict[int, Tensor]:
    """MᵀM of each factor by its id, summed over processes in one message a group."""
    by_rank: dict[int, list[DTensor]] = defaultdict(list)
    for factor in sorted(factors, key=lambda factor: factor.shape[0]):  # one order, whatever a process holds
        by_rank[factor.shape[1]].append(factor)
    grams = [_own_grams(alike) for alike in by_rank.values()]
    flat = torch.cat([one.flatten() for one in grams])
    device, mesh = flat.device, factors[0].device_mesh
    # offloaded to the host, where the GPUs' group cannot send from
    if device.type != mesh.device_type:
        flat = flat.to(torch.device(mesh.device_type, torch.accelerator.current_device_index()))
    for group in groups:
        dist.all_reduce(flat, group=group)
    summed = flat.to(device).split([one.numel() for one in grams])
    every = zip(by_rank.values(), grams, summed, strict=True)
    return {
        id(factor): one for alike, own, of_all in every for factor, one in zip(alike, of_all.view_as(own), strict=True)
    }


def _own_grams(factors: "Sequence[DTensor]") -> Tensor:
    """M_pᵀM_p [n, r, r] of the rows M_p of n factors that this process holds."""
    own = ([rows(factor.detach()) for factor in chunk] for chunk in _chunks(factors))
    return torch.cat([gram(torch.cat(some), [len(one) for one in some]) for some in own])
