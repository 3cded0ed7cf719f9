"""Many saved adapters loaded onto one model.

PEFT's `load_adapter` walks through all that the model holds for each adapter, so that a thousand of
them take hours. Here an adapter whose layers are adapted already costs its own file alone.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from peft import PeftModel

from svdtune.errors import SvdtuneError
from svdtune.methods.files.adapter import SavedAdapter, read_adapter
from svdtune.methods.files.compact import restore
from svdtune.methods.files.integrity import PEFT_ROOT, check_base, check_finite, check_tensors
from svdtune.methods.layers.base import Shapes, SvdLayer
from svdtune.methods.settings import settings

Layers = dict[str, SvdLayer[Any]]


def load_adapters(model: PeftModel, folders: Mapping[str, str | Path]) -> list[str]:
    """Load many saved adapters of one method, as fast as their files can be read.

    The first adapter is loaded by `model.load_adapter`. The others are put beside it with the same
    checks. An adapter whose frozen factors equal those of the first shares them, and adds only its
    own trained numbers. None becomes active; choose one with `adapter_names` or `set_adapter`.

    Args:
        model: with one adapter at least, from `PeftModel.from_pretrained` or `get_peft_model`.
        folders: of each adapter, by the name that it is to have.

    Returns:
        The names.

    Raises:
        SvdtuneError: a name that is taken or has a dot, a folder that holds no such adapter, or one
            of another base model or method. Those before it are loaded, and it is not.
    """
    checked: list[Mapping[str, str]] = []
    shapes: dict[str, Shapes] = {}
    for name, folder in folders.items():
        if name in model.peft_config or "." in name or not name:
            raise SvdtuneError(
                f"an adapter cannot be loaded as {name!r}: the model has one of that name, or the name is empty or has a dot. "
                "Give another name, or delete_adapter first"
            )
        saved = read_adapter(folder)
        there = {at: layer for at, layer in model.get_base_model().named_modules() if isinstance(layer, SvdLayer)}
        config, layers = saved.config, {at: there[at] for at in saved.layers if at in there}
        plain = not (saved.others or config.modules_to_save or config.bias != "none")
        if (
            not plain
            or len(layers) < len(saved.layers)
            or any(layer.method != config.method for layer in layers.values())
        ):
            model.load_adapter(str(folder), name)
            continue
        if config.base_fingerprint not in checked:
            check_base(config.base_fingerprint, layers)
            checked.append(config.base_fingerprint)
        config.inference_mode = True
        alike = repr([getattr(config, field.name) for field in settings(config)])
        try:
            _put_on(saved, layers, name, shapes.setdefault(alike, {}))
        except SvdtuneError:
            for layer in layers.values():
                if name in layer.r:
                    layer.delete_adapter(name)
            raise
        model.peft_config[name] = config
    return list(folders)


def _put_on(saved: SavedAdapter, layers: Layers, name: str, shapes: Shapes) -> None:
    """Add an adapter with a file's values to its layers. `shapes` holds those of adapters with the
    same settings.

    Raises:
        SvdtuneError: the file is not what this model needs.
    """
    for at, layer in layers.items():
        saved.config.check_layer(at, layer)
    with init_empty_weights():
        for at, layer in layers.items():
            layer.update_layer(name, saved.config.ranks[at], saved.config, load_only=True, shapes=shapes)
    given = {}
    in_file = {
        f"{PEFT_ROOT}{at}.{part}": tensor for at, parts in saved.layers.items() for part, tensor in parts.items()
    }
    check_finite(in_file, saving=False)
    for at, layer in layers.items():
        there = (part for part in (*layer.trained, *layer.frozen) if part in saved.layers[at])
        given[at] = layer, {part: saved.layers[at][part] for part in there}
    restore(in_file, given, name)
    for at, (layer, tensors) in given.items():
        check_tensors(at, layer.adapter_tensors(name), tensors)
        values = {
            # fp32 as by load_adapter; what is mapped from a file would keep all of it in memory
            part: tensor.to(torch.promote_types(tensor.dtype, torch.float32), copy=part in layer.trained)
            for part, tensor in tensors.items()
        }
        layer.fill(name, values, ())
        layer._move_adapter_to_device_of_base_layer(name)
