"""SORSA's factors where FSDP2 spread their rows over processes: Gram matrices from what each
process holds.

    UᵀU = Σ_p U_pᵀ U_p      U_p [out / n, r], the rows of process p

The sum is all that has to be sent, r² numbers a factor, all factors at once; rows of the gradient 2
U_p E / ‖E‖ follow from it.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor

from svdtune.errors import SvdtuneError
from svdtune.methods.compute.gram import gram

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_sharded(tensor: Tensor) -> "TypeGuard[DTensor]":
    """Whether a tensor is a DTensor; what may not be there in a torch without distributed training
    is not imported for it."""
    return hasattr(tensor, "to_local")


def rows(factor: Tensor) -> Tensor:
    """The rows of a factor that this process holds: all of them, unless the factor is sharded."""
    return factor.to_local() if is_sharded(factor) else factor


def whole(tensor: Tensor) -> Tensor:
    """A tensor put together, where it is sharded; every process must call it."""
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
    """MᵀM [r, r] of every sharded factor, by its id, with one all-reduce for all; {} where none is
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
        grams = [gram(rows(factor.detach())[None])[0] for factor in sharded]
        _sum_over(groups, grams, sharded[0])
        found |= {id(factor): one for factor, one in zip(sharded, grams, strict=True)}
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


def _sum_over(groups: Sequence[Any], grams: list[Tensor], like: "DTensor") -> None:
    """Sum matrices over processes, in place, in one message a group."""
    flat = torch.cat([one.flatten() for one in grams])
    device = flat.device
    # offloaded to the host, where the GPUs' group cannot send from
    if device.type != like.device_mesh.device_type:
        flat = flat.to(torch.device(like.device_mesh.device_type, torch.accelerator.current_device_index()))
    for group in groups:
        dist.all_reduce(flat, group=group)
    summed = flat.to(device).split([one.numel() for one in grams])
    for one, total in zip(grams, summed, strict=True):
        one.copy_(total.view_as(one))
