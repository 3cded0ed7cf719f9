"""SORSA's regularizer under DeepSpeed's ZeRO, whose optimizer steps flat tensors instead of
parameters.

A flat tensor is this process's part of a group of parameters, laid end to end. The optimizer inside
ZeRO's steps it after its gradient was averaged and clipped. There the penalty's gradient is added,
cut to the same part. Stages 1 and 2 leave the factors whole, so nothing is sent. Stage 3 gathers
the factors of one shape at a time.
"""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from svdtune.errors import SvdtuneError
from svdtune.methods.sorsa.config import SorsaConfig
from svdtune.methods.sorsa.math import penalty


class Partition(NamedTuple):
    """Where a process's part of a parameter is: `numel` numbers, from `offset` in the flat tensor
    of `group`, from `start` in the flattened parameter."""

    group: int
    offset: int
    start: int
    numel: int


def is_zero(optimizer: Any) -> bool:
    """Whether an optimizer is one of ZeRO's."""
    return hasattr(optimizer, "single_partition_of_fp32_groups") or hasattr(optimizer, "fp32_partitioned_groups_flat")


class ZeroFactors:
    """SORSA's factors as ZeRO's optimizer keeps them.

    Args:
        zero: ZeRO's optimizer.
        factors: every trained U and V, with its adapter's configuration.

    Raises:
        SvdtuneError: DeepSpeed rounded the factors to 16 bits.
    """

    def __init__(self, zero: Any, factors: list[tuple[nn.Parameter, SorsaConfig]]):
        if any(factor.dtype != torch.float32 for factor, _ in factors):
            raise SvdtuneError(
                "DeepSpeed rounded SORSA's factors to 16 bits, in which what they learn is lost beside what they start from. "
                'In its configuration set "bf16": {"enabled": false} and "torch_autocast": {"enabled": true, "dtype": '
                '"bfloat16"}, as configs/accelerate/zero2.json does'
            )
        self.zero, self.count = zero, len(factors)
        self.whole = hasattr(zero, "single_partition_of_fp32_groups")  # stages 1 and 2
        groups = zero.bit16_groups if self.whole else zero.fp16_groups
        group_of = {id(parameter): number for number, group in enumerate(groups) for parameter in group}
        self.factors: dict[int, list[tuple[nn.Parameter, SorsaConfig]]] = defaultdict(list)
        for factor, config in factors:
            self.factors[group_of[id(factor)]].append((factor, config))
        self.parts: dict[int, Tensor] = {}

    def stepped(self, optimizer: torch.optim.Optimizer) -> Iterator[tuple[int, Tensor]]:
        """The groups, with their flat tensors, that the optimizer is about to step."""
        flats = self.zero.single_partition_of_fp32_groups if self.whole else self.zero.fp32_partitioned_groups_flat
        now = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        return ((number, flat) for number, flat in enumerate(flats) if id(flat) in now)

    def place(self, group: int, factor: Any) -> Partition | None:
        """This process's part of a factor, as ZeRO notes it on the factor; None if it has none."""
        if self.whole:
            mapping = factor._hp_mapping
            if mapping is None:
                return None
            own, flat = mapping.lp_fragment_address, mapping.hp_fragment_address
            return Partition(group, flat.start, own.start, own.numel)
        _, offset, size = self.zero.grad_position[self.zero.get_param_id(factor)]
        start = size * dist.get_rank(factor.ds_process_group)
        # what is beyond the parameter's end fills partitions up to one size
        numel = min(size, factor.ds_numel - start)
        return Partition(group, offset, start, numel) if numel > 0 else None

    @torch.no_grad()
    def add_gradients(self, optimizer: torch.optim.Optimizer, max_learning_rate: float) -> Tensor | None:
        """`add_regularizer_gradients` for the flat tensors that are about to be stepped. Returns
        L_reg over all groups."""
        for group, flat in self.stepped(optimizer):
            total = torch.zeros((), device=flat.device)
            for (share, gamma, eps, _), alike in self._alike(group).items():
                with self._gathered(alike):
                    norms, gradients = penalty([f.detach() for f in alike], eps, share * gamma / max_learning_rate)
                total += (norms.sum() * share).to(total.device)
                for factor, gradient in zip(alike, gradients, strict=True):
                    place = self.place(group, factor)
                    if gamma > 0 and place is not None and flat.grad is not None:
                        own = gradient.flatten().narrow(0, place.start, place.numel)
                        flat.grad.narrow(0, place.offset, place.numel).add_(own.to(flat.grad))
            self.parts[group] = total
        return cast(Tensor, sum(self.parts.values())) if self.parts else None

    def _alike(self, group: int) -> dict[tuple[Any, ...], list[nn.Parameter]]:
        """A group's factors by what their penalty depends on: share, γ, ε and shape."""
        found: dict[tuple[Any, ...], list[nn.Parameter]] = defaultdict(list)
        for factor, config in self.factors.get(group, ()):
            share = 1 / self.count if config.reduction == "mean" else 1.0
            shape = tuple(getattr(factor, "ds_shape", factor.shape))
            found[share, config.gamma, config.smooth_eps, shape].append(factor)
        return found

    def _gathered(self, factors: list[nn.Parameter]) -> Any:
        if self.whole:
            return nullcontext()
        import deepspeed

        return deepspeed.zero.GatheredParameters(factors)
