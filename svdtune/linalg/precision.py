"""fp32 products in fp32: no autocast, no TF32 and no bf16 inside a block, whatever the user
allowed. Afterwards the user's choice is back. Only this file does so."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Run without autograd, without autocast, and with fp32 products in fp32, on the CPU where the
    device is neither that nor CUDA."""
    kind = device.type if device.type in ("cpu", "cuda") else "cpu"
    with torch.no_grad(), ieee(torch.device(kind)):
        yield


@contextmanager
def ieee(device: torch.device) -> Iterator[None]:
    """Run without autocast and with fp32 products in fp32: no TF32 of GPUs, no bf16 of CPUs."""
    with torch.autocast(device.type, enabled=False), _Ieee():
        yield


class _Ieee:
    """Holds the process's settings while any thread is inside; the last to leave puts them back."""

    _lock = threading.Lock()
    _inside = 0
    _put_back: tuple[Callable[[], None], ...] = ()

    def __enter__(self) -> None:
        with _Ieee._lock:
            if _Ieee._inside == 0:
                _Ieee._put_back = _forbid()
            _Ieee._inside += 1

    def __exit__(self, *_: object) -> None:
        with _Ieee._lock:
            _Ieee._inside -= 1
            if _Ieee._inside == 0:
                for put_back in _Ieee._put_back:
                    put_back()


def _forbid() -> tuple[Callable[[], None], ...]:
    """Forbid less than fp32 in matrix products. Return what puts the user's choice back.

    torch 2.9 gave GPUs and CPUs a setting each. If they were set apart, the older one for both
    raises a RuntimeError from then on, so only 2.8 is asked for it.
    """
    settings = [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)]
    if all(hasattr(setting, "fp32_precision") for setting in settings):
        return tuple(partial(_set, each, before) for each in settings if (before := _forbid_one(each)))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    return (partial(torch.set_float32_matmul_precision, before),)


def _forbid_one(setting: Any) -> str | None:
    """Set "ieee", and tell what stood there; None where that is as good.

    A setting that is "none" reads as the one above it, `torch.backends.fp32_precision`. One that
    says what it would read anyway is taken for such: torch does not tell them apart.
    """
    before = setting.fp32_precision
    if before in ("none", "ieee"):
        return None
    setting.fp32_precision = "none"
    inherits = setting.fp32_precision == before
    setting.fp32_precision = "ieee"
    return "none" if inherits else before


def _set(setting: Any, precision: str) -> None:
    setting.fp32_precision = precision
