"""What of a model and its optimizer is spread over processes, put together to be saved, and spread
again to go on.

A checkpoint holds whole tensors, whatever the processes held: it is gone on from by another number
of them, sharded or not.
"""

from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from svdtune import processes


def is_spread(model: nn.Module) -> bool:
    """Whether processes hold parts of the model's parameters: under FSDP2, or ZeRO-3."""
    return any(hasattr(p, "full_tensor") or hasattr(p, "ds_id") for p in model.parameters())


def saved_state(model: nn.Module) -> dict[str, Tensor]:
    """What is trained and what belongs to an adapter, whole and on the CPU, by name; in the main
    process, {} in others.

    One tensor at a time is put together. Every process must call it.
    """
    adapters = set(model.peft_config) if isinstance(model, PeftModel) else set()
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or not adapters.isdisjoint(name.split(".")):
            whole = _whole(parameter)
            if processes.is_main():
                found[name] = whole.cpu()
    return found


def _whole(parameter: Any) -> Tensor:
    if hasattr(parameter, "full_tensor"):
        return parameter.detach().full_tensor()
    if not hasattr(parameter, "ds_id"):
        return parameter.detach().clone()
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):  # which ZeRO-3 has partitioned
        return parameter.detach().clone()


def whole_optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """`optimizer.state_dict()` with whole tensors on the CPU; of use in the main process alone.
    Every process must call it."""
    state = optimizer.state_dict()
    whole = {}
    for number, values in state["state"].items():
        gathered = {
            key: value.full_tensor() if hasattr(value, "full_tensor") else value for key, value in values.items()
        }
        if processes.is_main():
            whole[number] = {
                key: value.cpu() if isinstance(value, Tensor) else value for key, value in gathered.items()
            }
    return {**state, "state": whole}


def spread_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """A whole optimizer's state with what belongs to sharded parameters spread as these are: each
    process keeps its own."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    spread = {
        number: {key: _spread_like(parameters[number], value) for key, value in values.items()}
        for number, values in state["state"].items()
    }
    return {**state, "state": spread}


def _spread_like(parameter: Any, value: Any) -> Any:
    if not hasattr(parameter, "full_tensor") or not isinstance(value, Tensor) or value.shape != parameter.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
