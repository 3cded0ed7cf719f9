"""Where a model computes: the device that was named, else a GPU where there is one."""

from typing import Any

import torch

from svdtune.spectra.devices import check_device


def placement(dtype: str | None, device: str | None) -> dict[str, Any]:
    """Arguments for `load`: what was asked for, and a GPU where there is one and none was named.

    Raises:
        SvdtuneError: there is no such device.
    """
    check_device(device)
    found = device or ("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else None)
    return {key: value for key, value in {"dtype": dtype, "device": found}.items() if value is not None}
