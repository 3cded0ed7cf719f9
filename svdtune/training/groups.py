"""Parameters that learn at rates of their own, as LoRA+ has B learn faster than A."""

from collections.abc import Mapping
from typing import Any

import torch

from svdtune.errors import SvdtuneError


def split_groups(
    optimizer: torch.optim.Optimizer, names: Mapping[torch.nn.Parameter, str], ratios: Mapping[str, float]
) -> None:
    """Give parameters a group of the optimizer for each ratio of the learning rate.

    Args:
        optimizer: that has not stepped yet.
        names: of its parameters.
        ratios: by a part of a name between its dots, such as `lora_B`. Where a name has several of
            them, the first counts.

    Raises:
        SvdtuneError: if no parameter has one of the parts.
    """
    parts = {
        name: name.split(".") for group in optimizer.param_groups for name in map(names.__getitem__, group["params"])
    }
    for part in ratios:
        if not any(part in found for found in parts.values()):
            there = sorted({piece for found in parts.values() for piece in found if not piece.isdigit()})
            raise SvdtuneError(
                f"training.learning_rate_ratios: no parameter that is trained has the part {part!r} in its name; there are "
                f"{', '.join(there)}"
            )
    for group in list(optimizer.param_groups):
        split: dict[str | None, list[Any]] = {None: []}
        for parameter in group["params"]:
            found = parts[names[parameter]]
            split.setdefault(next((part for part in ratios if part in found), None), []).append(parameter)
        group["params"] = split.pop(None)
        for chosen, parameters in split.items():
            assert chosen is not None
            optimizer.add_param_group({**group, "params": parameters, "lr": group["lr"] * ratios[chosen]})
