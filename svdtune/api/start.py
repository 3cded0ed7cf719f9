"""A new adapter: written for a model on disk, or put on a loaded one."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from peft import LoraConfig, PeftModel
from torch import nn

from svdtune.api.adapters import ConfigLike
from svdtune.api.inputs import WantedAdapter, asked
from svdtune.errors import SvdtuneError
from svdtune.linalg import Components
from svdtune.methods.config import SvdConfig
from svdtune.spectra.devices import check_device

if TYPE_CHECKING:
    from svdtune.methods.start.disk import Started
    from svdtune.training.recipe import Recipe


@overload
def start(
    model: nn.Module,
    config: ConfigLike,
    *,
    components: Components = "first",
    seed: int = 0,
) -> PeftModel: ...
@overload
def start(
    model: "str | Path | Recipe | Mapping[str, Any]",
    config: ConfigLike | None,
    output: str | Path,
    *,
    components: Components = "first",
    seed: int = 0,
    device: str | None = None,
    progress: bool | None = None,
) -> "Started": ...
def start(
    model: "str | Path | nn.Module | Recipe | Mapping[str, Any]",
    config: ConfigLike | None,
    output: str | Path | None = None,
    *,
    components: Components = "first",
    seed: int = 0,
    device: str | None = None,
    progress: bool | None = None,
) -> "Started | PeftModel":
    """Start a new adapter: for a model on disk, which need not fit into memory, written one weight
    at a time; or on a loaded model, which it changes as `get_peft_model` does.

    What is written is what `get_peft_model` starts on the loaded model after
    `torch.manual_seed(seed)`, to the bit on the same device. Load it with
    `PeftModel.from_pretrained(model, output, is_trainable=True)`.

    A stock LoRA that starts from a decomposition (`init_lora_weights` "pissa", "olora" or "mica")
    equals PEFT's own exact one to rounding, and is loaded by PEFT alone. PiSSA and OLoRA take their
    start off the weights: `output` then has the adapter in `adapter`, and in `residual` the
    checkpoint to load it on.

    Args:
        model: a model folder, a `.gguf` file or a hub name, or a recipe; or a loaded model.
        config: of a new SARA, Mo-SARA or SORSA adapter, or such a LoRA; None with a recipe. Of a
            loaded model, of any PEFT method, started inside `fast_starts`.
        output: folder to create; left out for a loaded model.
        components: the triplets that "pissa" starts from: "first", "middle", "last" (MiLoRA), or
            (start, stop). SORSA has a setting of its own for it.
        seed: of what starts at random; torch's own state stays as it is.
        device: where the weights of a model on disk are decomposed; a GPU by default, where there
            is one.
        progress: show a bar; by default where stderr is a terminal.

    Returns:
        A loaded model's PeftModel. Else `adapter`, the folder; `ranks` by layer; `trained` and
        `frozen`, counts of numbers; `residual`, the folder of the weights that are left, or None.

    Raises:
        SvdtuneError: another method, settings that need the whole model, a layer that cannot be
            adapted, or an output that exists or cannot be written.
    """
    check_device(device)
    wanted = asked("start", model, config)
    if isinstance(wanted.model, nn.Module):
        if output is not None or device is not None:
            raise SvdtuneError(
                "start was given a loaded model, on which it puts the adapter: leave out the folder and `device`, and write it "
                "with save_pretrained; or give the model's folder in place of the model"
            )
        return _put_on(wanted, components, seed)
    if output is None:
        raise SvdtuneError(
            "start writes the adapter of a model on disk to a folder: give one, as in start(model, config, 'new')"
        )
    return begin("start", wanted, output, components, seed, device, progress)


def _put_on(wanted: WantedAdapter, components: Components, seed: int) -> PeftModel:
    """A loaded model with the new adapter that was asked for."""
    from svdtune.methods.injection import inject
    from svdtune.methods.start.disk import seeded
    from svdtune.starts import fast_starts
    from svdtune.starts.disk import check_components
    from svdtune.starts.pairs import PISSA, start_of

    model, config = wanted.open(), wanted.config
    assert isinstance(model, nn.Module)
    if config is None:
        raise SvdtuneError(
            "start was given no configuration: expected one of PEFT such as LoraConfig(init_lora_weights='pissa')"
        )
    init = start_of(config)
    if (PISSA.fullmatch(init) or init in ("olora", "mica")) and any(part.is_meta for part in model.parameters()):
        raise SvdtuneError(
            "start was given a model whose weights are on the meta device and have no values; load them first, or name the "
            "model's folder, in start(folder, config, output)"
        )
    if isinstance(config, LoraConfig):
        check_components(config, components)
    else:
        _check_no_components("start", components)
    with fast_starts(components), seeded(seed):
        return inject(model, config)


def _check_no_components(who: str, components: Components) -> None:
    if components != "first":
        given = components if isinstance(components, str) else f"'{json.dumps(components)}'"
        there = f"--method.components {given}" if who.startswith("svdtune ") else "SorsaConfig(components=…)"
        raise SvdtuneError(f"components is for LoRA's PiSSA here; give SORSA's in its configuration: {there}")


def begin(
    who: str,
    wanted: WantedAdapter,
    output: str | Path,
    components: Components,
    seed: int,
    device: str | None,
    progress: bool | None = None,
) -> "Started":
    """Write the start of an adapter that was asked for; the rest as in `start`.

    Args:
        who: the function or verb, for messages.
        wanted: from `asked`.
    """
    from svdtune.checkpoint import Checkpoint
    from svdtune.methods.start.disk import start as write
    from svdtune.starts.disk import start_lora

    config = wanted.config
    if not isinstance(config, SvdConfig) and type(config) is not LoraConfig:
        raise SvdtuneError(
            f"{who} takes a SaraConfig, MoSaraConfig, SorsaConfig or LoraConfig of a new adapter; got {type(config).__name__}"
        )
    opened = wanted.open()
    assert isinstance(opened, Checkpoint)  # it was named
    if isinstance(config, SvdConfig):
        _check_no_components(who, components)
        return write(opened, config, output, seed=seed, device=device, progress=progress)
    return start_lora(opened, config, output, components=components, device=device, progress=progress)
