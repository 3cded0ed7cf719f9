"""What each process of these tests does; it leaves what it found in FOLDER/process-N.pt."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from peft import get_peft_model
from tiny_steps import METHODS, shard, start, tiny, train
from torch import nn

import svdtune
from svdtune.methods.sorsa.regularizer import trained_factors
from svdtune.methods.start import memory
from svdtune.spectra import decompose


def run(index: int, processes: int, folder: Path, steps: int) -> None:
    """Every scenario, one after the other, in a process of its own."""
    start(folder, index, processes)
    os.environ["SVDTUNE_CACHE"] = str(folder / "cache")
    found = {
        "starts": {method: started(method) for method in METHODS},
        "another start": started("sorsa"),
        "main alone": {method: main_alone(method, index) for method in METHODS},
        "another default dtype": in_float64(),
        "drawn apart": drawn_apart(index),
        "another model": failure(lambda: adapt(tiny(seed=int(index == processes - 1)), "sorsa")),
        "another rank": failure(lambda: get_peft_model(tiny(), svdtune.SorsaConfig(r=2 + min(index, 1)))),
        "one bad weight": failure(lambda: adapt(broken(tiny()), "sorsa")),
        "one unreadable weight": unreadable(index),
        "one failed decomposition": undecomposable(index, processes - 1),
        "regularizer": regularizer_gradients(shard),
        "steps": {
            (strategy, method): train(method, strategy, steps) for strategy in ("ddp", "fsdp2") for method in METHODS
        },
    }
    torch.save(found, folder / f"process-{index}.pt")
    dist.destroy_process_group()


def adapt(model: nn.Module, method: str) -> nn.Module:
    return get_peft_model(model, METHODS[method]())


def in_float64() -> str:
    """The digest of a start in a program that makes tensors in float64 unless told otherwise."""
    model = tiny()
    torch.set_default_dtype(torch.float64)
    try:
        return digest(adapt(model, "sorsa"))
    finally:
        torch.set_default_dtype(torch.float32)


def main_alone(method: str, index: int) -> dict[str, Any]:
    """How an adapter starts where the main process alone has the weights."""
    with mock.patch.dict(os.environ, EFFICIENT | {"LOCAL_RANK": str(index)}):
        return started(method, loaded_by_main(index))


# FSDP's RAM-efficient loading
EFFICIENT = {"ACCELERATE_USE_FSDP": "true", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}


def loaded_by_main(index: int) -> nn.Module:
    """A model that is empty in all processes but the first."""
    model = tiny()
    if index > 0:
        for parameter in model.parameters():
            parameter.data.zero_()
    return model


def started(method: str, model: nn.Module | None = None) -> dict[str, Any]:
    """How an adapter starts: its tensors' digest, and how many weights this process decomposed for
    it."""
    model = model or tiny()
    counts = {
        name: Counted(getattr(decompose, name)) for name in ("band_factors", "factors_at_threshold", "settled_spectrum")
    }
    for name, counted in counts.items():
        setattr(decompose, name, counted)
    try:
        torch.manual_seed(1)
        model = adapt(model, method)
    finally:
        for name, counted in counts.items():
            setattr(decompose, name, counted.function)
    config = model.peft_config["default"]
    return {
        "decomposed": sum(counted.calls for counted in counts.values()),
        "ranks": config.ranks,
        "fingerprints": config.base_fingerprint,
        "digest": digest(model),
    }


class Counted:
    """A function that counts its calls."""

    def __init__(self, function: Callable):
        self.function, self.calls = function, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return self.function(*args, **kwargs)


def digest(model: nn.Module) -> str:
    """Of every byte of an adapter."""
    tensors = model.state_dict()
    names = [name for name in sorted(tensors) if any(part in name for part in ("sorsa_", "sara_", "frozen_"))]
    return hashlib.sha256(b"".join(tensors[name].numpy().tobytes() for name in names)).hexdigest()


def drawn_apart(index: int) -> tuple[str, float]:
    """A random start where each process has a seed of its own: its digest, and the number drawn
    after it."""
    model = tiny()
    torch.manual_seed(100 + index)
    return digest(adapt(model, "sara")), float(torch.rand(()))


def broken(model: nn.Module) -> nn.Module:
    """A model with one weight that is not finite."""
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = torch.nan
    return model


def unreadable(index: int) -> tuple[str, bool]:
    """What is said where the main process alone has the weights and cannot read one of them."""

    def refuse() -> torch.Tensor:
        raise svdtune.SvdtuneError("the weight cannot be read")

    def readers(work: memory.Work, names: list[str]) -> dict[str, Callable]:
        found = original(work, names)
        return {name: refuse if work.shapes[name] == (44, 32) else read for name, read in found.items()}

    original = memory.Work._of
    with mock.patch.object(memory.Work, "_of", readers):
        return failure(lambda: main_alone("sorsa", index))


def undecomposable(index: int, failing: int) -> tuple[str, bool]:
    """The same where one process fails, in the first round already, with an error that svdtune does
    not know."""

    def decompose_or_fail(*args: Any, **kwargs: Any) -> Any:
        if index == failing:
            raise RuntimeError("no room")
        return original(*args, **kwargs)

    original = decompose.band_factors
    with mock.patch.object(decompose, "band_factors", decompose_or_fail):
        return failure(lambda: main_alone("sorsa", index))


def failure(work: Callable[[], Any]) -> tuple[str, bool]:
    """The sentence with which something is refused, and whether every process says it."""
    try:
        work()
    except svdtune.SvdtuneError as error:
        return str(error), error.everywhere
    except RuntimeError as error:
        return str(error), False
    return "", False


def regularizer_gradients(wrap: Callable[[nn.Module], nn.Module]) -> dict[str, Any]:
    """L_reg and its gradients for factors that have moved, some with a gradient already and some
    without."""
    model = adapt(tiny(), "sorsa")
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for factor, _ in trained_factors(model):
            factor += 0.1 * torch.randn(factor.shape, generator=generator)
    model = wrap(model)
    for number, (factor, _) in enumerate(trained_factors(model)):
        factor.grad = torch.ones_like(factor) if number % 2 else None
    value = svdtune.add_regularizer_gradients(model, 0.01)
    gradients = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            whole = parameter.grad.full_tensor() if hasattr(parameter.grad, "full_tensor") else parameter.grad
            gradients[name] = whole.clone()
    return {"value": float(value), "gradients": gradients}
