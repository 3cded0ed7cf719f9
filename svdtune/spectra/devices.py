"""Where weights are decomposed: on a GPU if there is one, even if they lie on the CPU."""

import os
import warnings
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from svdtune import processes
from svdtune.errors import SvdtuneError, SvdtuneWarning
from svdtune.system import is_out_of_memory

DEVICE = "SVDTUNE_DEVICE"  # the environment variable that names one
CPU = torch.device("cpu")
Result = TypeVar("Result")


def devices_for_work(named: str | None = None) -> list[torch.device]:
    """The devices that decompose weights which lie on the CPU.

    Args:
        named: one of them, such as "cpu" or "cuda:1"; None for what SVDTUNE_DEVICE names, else all
            GPUs, of several processes each its own, else the CPU.

    Raises:
        SvdtuneError: there is no such device.
    """
    if word := named or os.environ.get(DEVICE):
        check_device(word)
        return [_numbered(torch.device(word))]
    if not torch.cuda.is_available():
        return [CPU]
    if processes.count() > 1:
        return [torch.device("cuda", torch.cuda.current_device())]
    return [torch.device("cuda", number) for number in range(torch.cuda.device_count())]


def check_device(device: str | None) -> None:
    """Make sure that a device is there, if one is named.

    Raises:
        SvdtuneError: there is none.
    """
    try:
        torch.empty(0, device=device)  # None is the CPU
    except (RuntimeError, AssertionError) as error:
        gpus = torch.cuda.device_count()
        there = ", ".join(["cpu", *(f"cuda:{number}" for number in range(gpus))])
        raise SvdtuneError(f"the device {device!r} is not there; expected one of {there}") from error


def _numbered(device: torch.device) -> torch.device:
    """The device that a tensor sent there will say it is on."""
    return torch.device("cuda", torch.cuda.current_device()) if device == torch.device("cuda") else device


def on_device(compute: Callable[[Tensor], Result], weight: Tensor, device: torch.device) -> Result:
    """compute(weight) on a device. The tensors that it gives come back to where the weight lies. A
    device without room hands the weight back to where it lies, or to the CPU where it lies on the
    device itself, with a warning."""
    there = device
    try:
        found = compute(weight.to(there))
    except Exception as error:
        there = CPU if weight.device == device else weight.device
        if not is_out_of_memory(error) or there == device:
            raise
        warnings.warn(
            f"{device} has no room to decompose a weight {list(weight.shape)}, which is done on {there} instead; "
            f"{DEVICE}=cpu leaves all of them where they are",
            SvdtuneWarning,
            stacklevel=2,
        )
        found = compute(weight.to(there))
    if there == weight.device:
        return found
    from accelerate.utils import send_to_device

    back: Result = send_to_device(found, weight.device)
    return back
