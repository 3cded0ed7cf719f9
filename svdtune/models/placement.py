"""Where a model computes: the device that was named, else a GPU where there is one."""

from typing import Any

import torch

from svdtune.errors import SvdtuneError


def placement(dtype: str | None, device: str | None) -> dict[str, Any]:
    """Arguments for `load`: what was asked for, and a GPU where there is one and none was named.

    Raises:
        SvdtuneError: there is no such device.
    """
    if device is not None:
        check_device(device)
    found = device or ("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else None)
    return {key: value for key, value in {"dtype": dtype, "device": found}.items() if value is not None}


def check_device(device: str) -> None:
    """Make sure that there is such a device.

    Raises:
        SvdtuneError: there is none.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        gpus = torch.cuda.device_count()
        there = ", ".join(["cpu", *(f"cuda:{number}" for number in range(gpus))])
        raise SvdtuneError(f"the device {device!r} is not there; expected one of {there}") from error
