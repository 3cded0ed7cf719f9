"""Whether a saved adapter is whole, and whether a model is the one that it was made from."""

import hashlib
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from svdtune import spectra
from svdtune.errors import SvdtuneError
from svdtune.methods.layers.quantized import is_quantized
from svdtune.spectra.content import content_key

ADAPTER_CONFIG, ADAPTER_WEIGHTS, PICKLED_WEIGHTS = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "adapter_model.bin",
)

_ROOT = "base_model.model."


def file_digest(path: Path) -> str:
    """SHA-256 of a file, 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def holds(path: Path, tensors: Mapping[str, Tensor]) -> bool:
    """Whether a safetensors file has these tensors, bit for bit; PEFT's prefix does not count."""
    try:
        with safe_open(path, framework="pt") as file:
            keys = {key.removeprefix(_ROOT): key for key in file.keys()}  # noqa: SIM118
            found = {name: keys.get(name.removeprefix(_ROOT)) for name in tensors}
            return all(
                key is not None and torch.equal(file.get_tensor(key), tensors[name]) for name, key in found.items()
            )
    except (SafetensorError, OSError):
        return False


def check_weights_file(folder: Path, digest: str | None) -> None:
    """Make sure that an adapter's weights are the file that was saved, before anything is done to a
    model.

    Raises:
        SvdtuneError: the file is missing, a pickle, cut short, or was changed since.
    """
    path = folder / ADAPTER_WEIGHTS
    if not path.is_file():
        if (folder / PICKLED_WEIGHTS).is_file():
            raise SvdtuneError(
                f"{folder / PICKLED_WEIGHTS} is a pickle, which can run code when it is loaded; svdtune reads "
                f"{ADAPTER_WEIGHTS} alone. Save the adapter again, without safe_serialization=False"
            )
        if digest is not None:
            raise SvdtuneError(f"{folder} has no {ADAPTER_WEIGHTS}; copy the whole folder of the adapter")
        return
    try:
        with safe_open(path, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise SvdtuneError(
            f"{path} is cut short or damaged ({error}); copy it again from where it was saved"
        ) from error
    if digest is not None and file_digest(path) != digest:
        raise SvdtuneError(
            f"{path} is not the file that was saved with this adapter: it was altered or belongs to another one. Copy the "
            f"folder again; if the change was meant, remove weights_sha256 from {ADAPTER_CONFIG}"
        )


def fingerprint(module: nn.Module) -> str | None:
    """16 hex digits that name a base weight by shape and content, None where the weight says
    nothing.

    The content is the weight rounded to bf16: an fp32 checkpoint and its bf16 copy have one
    fingerprint, and so has either after it was cast up. Differences below bf16's resolution are not
    seen. Quantized and meta weights have none, nor have weights that another adapter is merged
    into.
    """
    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    weight: Any = getattr(base, "weight", None)
    merged = isinstance(module, BaseTunerLayer) and module.merged
    offloaded = hasattr(base, "_hf_hook")
    if merged or is_quantized(getattr(base, "whole", base)) or (weight.is_meta and not offloaded):
        return None
    return weight_fingerprint(spectra.base_weight(base))


def weight_fingerprint(weight: Tensor) -> str:
    """The same of a weight [out, in]."""
    return content_key(weight.to(torch.bfloat16))[:16]


def check_base(recorded: Mapping[str, str], targets: Mapping[str, nn.Module]) -> None:
    """Refuse a base model that an adapter was not made from. SVDTUNE_BASE_CHECK=off lets it pass.

    Raises:
        SvdtuneError: naming the first layer whose weight is another one.
    """
    if os.environ.get("SVDTUNE_BASE_CHECK", "").strip().lower() == "off":
        return
    for name, module in targets.items():
        if name in recorded and (found := fingerprint(module)) not in (None, recorded[name]):
            raise SvdtuneError(
                f"the adapter was made from another base model: the weight of {name!r} differs (fingerprint {found}, the "
                f"adapter was made from {recorded[name]}). Load the checkpoint and revision that it was trained on, in fp32 "
                "or bf16, without other adapters merged into it. To use this base all the same, set the environment variable "
                "SVDTUNE_BASE_CHECK=off, or pass the adapter's configuration with base_fingerprint={}"
            )


def check_same_layers(ranks: Mapping[str, int], targets: Collection[str]) -> None:
    """Refuse a model that lacks layers of a saved adapter.

    Raises:
        SvdtuneError: naming the first of them.
    """
    lacking = [name for name in ranks if name not in targets]
    if lacking:
        raise SvdtuneError(
            f"the adapter was made for another model: this one has no layer {lacking[0]!r} to adapt ({len(lacking)} of the "
            f"adapter's {len(ranks)} layers are missing). Load it onto the model it was trained on"
        )


def check_tensors(layer: str, expected: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    """Refuse a checkpoint whose tensors for one layer are not those that the layer needs.

    Raises:
        SvdtuneError: naming the layer and the tensor.
    """
    for name, tensor in expected.items():
        if name not in given:
            raise SvdtuneError(
                f"the adapter's file lacks {name} of layer {layer!r}; it is incomplete, or another method's"
            )
        if given[name].shape != tensor.shape:
            raise SvdtuneError(
                f"the adapter's {name} of layer {layer!r} is {list(given[name].shape)}, but this model needs "
                f"{list(tensor.shape)}: it was made for a model of another size, or its file was altered"
            )
