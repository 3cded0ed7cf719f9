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
from svdtune.methods.layers.quantization import is_quantized
from svdtune.spectra.content import content_key

ADAPTER_CONFIG, ADAPTER_WEIGHTS, PICKLED_WEIGHTS = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "adapter_model.bin",
)

# What PEFT writes before the name of every tensor in an adapter's file.
PEFT_ROOT = "base_model.model."


def file_digest(path: Path) -> str:
    """SHA-256 of a file, 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def holds(path: Path, digests: Mapping[str, str]) -> bool:
    """Whether a safetensors file has tensors with these `content_key`s, by name; PEFT's prefix does
    not count."""
    try:
        with safe_open(path, framework="pt") as file:
            keys = {key.removeprefix(PEFT_ROOT): key for key in file.keys()}  # noqa: SIM118
            found = {name: keys.get(name.removeprefix(PEFT_ROOT)) for name in digests}
            return all(
                key is not None and content_key(file.get_tensor(key)) == digests[name] for name, key in found.items()
            )
    except (SafetensorError, OSError):
        return False


def has_any(path: Path, names: Collection[str]) -> bool:
    """Whether a safetensors file has a tensor of one of these names; PEFT's prefix does not
    count."""
    with safe_open(path, framework="pt") as file:
        return any(key.removeprefix(PEFT_ROOT) in names for key in file.keys())  # noqa: SIM118


def check_weights_file(folder: Path, digest: str | None) -> None:
    """Check that an adapter's weights are the file that was saved, before a model is touched.

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
    """16 hex digits that name a base weight by its shape and its content. None if the weight cannot
    tell its content.

    The content is the weight rounded to bf16. So an fp32 checkpoint and its bf16 copy have one
    fingerprint, also after a cast back up. Differences below bf16's resolution are not seen.
    Quantized weights, weights on the meta device and weights with an adapter merged into them have
    no fingerprint.
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
    if lacking and PEFT_ROOT + lacking[0] in targets:
        raise SvdtuneError(
            "the model has adapters already, and a second PeftModel around it would give every layer another name. Load a "
            "further adapter with model.load_adapter(folder, adapter_name='another'), or give the model without adapters"
        )
    if lacking:
        raise SvdtuneError(
            f"the adapter was made for another model: this one has no layer {lacking[0]!r} to adapt ({len(lacking)} of the "
            f"adapter's {len(ranks)} layers are missing). Load it onto the model it was trained on"
        )


def check_known_layers(fingerprints: Collection[str], ranks: Collection[str]) -> None:
    """Refuse fingerprints of layers that an adapter does not have: they would check nothing.

    Raises:
        SvdtuneError: naming the first of them.
    """
    if unknown := sorted(set(fingerprints) - set(ranks)):
        raise SvdtuneError(
            f"base_fingerprint in {ADAPTER_CONFIG} names layer {unknown[0]!r}, which the adapter does not have: the file was "
            "altered. Copy the adapter's folder again; to use another base model, give base_fingerprint={}"
        )


def check_tensor_names(allowed: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    """Refuse tensors that an adapter's configuration does not ask for: they would overwrite the
    base model.

    Args:
        allowed: the model's tensors that may be loaded, by name.
        given: what is to be loaded.

    Raises:
        SvdtuneError: naming the first tensor of another name, shape or kind.
    """
    for name, tensor in given.items():
        if name not in allowed:
            raise SvdtuneError(
                f"the adapter's file holds {name!r}, which its configuration does not ask for and this model would take for "
                "its own or has no place for: it was altered, or made for another model. Save the adapter again with "
                "save_pretrained; what is trained beside it is named in modules_to_save or bias"
            )
        if tensor.shape != allowed[name].shape:
            raise SvdtuneError(
                f"the adapter's {name} is {list(tensor.shape)}, but this model needs {list(allowed[name].shape)}: it was made "
                "for a model of another size, or its file was altered"
            )
        counts = not allowed[name].is_floating_point() and tensor.dtype == allowed[name].dtype  # of a batch norm
        if not counts and (not tensor.is_floating_point() or tensor.element_size() < 2):
            raise SvdtuneError(
                f"the adapter's {name} is stored as {str(tensor.dtype).removeprefix('torch.')}; expected float32, bfloat16, "
                "float16 or float64. Save the adapter again with save_pretrained"
            )


def check_finite(tensors: Mapping[str, Tensor], saving: bool) -> None:
    """Refuse an adapter that holds NaN or infinity. SVDTUNE_FINITE_CHECK=off lets it pass.

    Raises:
        SvdtuneError: naming the first such tensor.
    """
    if os.environ.get("SVDTUNE_FINITE_CHECK", "").strip().lower() == "off":
        return
    for name, tensor in tensors.items():
        if not tensor.is_meta and tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            does = "is not saved" if saving else "is not loaded"
            raise SvdtuneError(
                f"the adapter {does}: its {name.removeprefix(PEFT_ROOT)} holds NaN or infinity, as every output would. "
                "Its training diverged: train again with a lower learning rate. To have it all the same, set the environment "
                "variable SVDTUNE_FINITE_CHECK=off"
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
