"""Read a saved adapter from its folder: its configuration, and its tensors by layer; no model is needed."""

from dataclasses import dataclass
from pathlib import Path

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from svdtune.errors import SvdtuneError
from svdtune.methods.config import SvdConfig
from svdtune.methods.files.compact import PROBE
from svdtune.methods.files.integrity import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from svdtune.methods.layers.base import SvdLayer
from svdtune.system import read_json

_ROOT = "base_model.model."


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter as it lies on disk.

    Attributes:
        config: its configuration.
        layers: by module name, the layer's tensors by their names in `trained` and `frozen`; of a compact adapter, probes in
            the place of frozen ones.
        others: the rest of the file under its own names: biases and modules_to_save.
    """

    config: SvdConfig
    layers: dict[str, dict[str, Tensor]]
    others: dict[str, Tensor]


def read_adapter(folder: str | Path) -> SavedAdapter:
    """Read an adapter of svdtune's from a folder that `save_pretrained` wrote.

    Raises:
        SvdtuneError: there is none, it is another method's, it is damaged, or tensors of a layer are missing.
    """
    folder = Path(folder).expanduser()
    config = read_config(folder)
    path = folder / ADAPTER_WEIGHTS
    if not path.is_file():
        raise SvdtuneError(f"the adapter {folder} has no {ADAPTER_WEIGHTS}; save it again with save_pretrained")
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise SvdtuneError(f"{path} is damaged ({error}); copy it again from where it was saved") from error
    cls = layer_class(config)
    layers: dict[str, dict[str, Tensor]] = {}
    others = {}
    for key, tensor in tensors.items():
        layer, _, part = key.removeprefix(_ROOT).rpartition(".")
        if part.removesuffix(PROBE) in (*cls.trained, *cls.frozen):
            layers.setdefault(layer, {})[part] = tensor
        else:
            others[key] = tensor
    if lacking := sorted(set(config.ranks) ^ set(layers)):
        raise SvdtuneError(
            f"{path} does not belong to the {ADAPTER_CONFIG} beside it: they differ in layer {lacking[0]!r}"
        )
    frozen = {part + PROBE for part in cls.frozen} if config.compact else set(cls.frozen)
    parts = frozen.union(
        *layers.values()
    )  # which trained tensors there are, the settings decide: the same for all layers
    for layer, tensors in layers.items():
        if lacking := sorted(parts - set(tensors)):
            raise SvdtuneError(f"{path} lacks {lacking[0]} of layer {layer!r}; it is incomplete, or another method's")
    return SavedAdapter(config, layers, others)


def read_config(folder: Path) -> SvdConfig:
    """The configuration of an adapter of svdtune's.

    Raises:
        SvdtuneError: there is none, it is damaged, or it is another method's.
    """
    path = folder / ADAPTER_CONFIG
    if not path.is_file():
        found = "that folder does not exist" if not folder.is_dir() else f"it has no {ADAPTER_CONFIG}"
        raise SvdtuneError(f"{folder} is not an adapter folder: {found}")
    cls = PEFT_TYPE_TO_CONFIG_MAPPING.get(peft_type := str(read_json(path).get("peft_type")))
    if cls is None or not issubclass(cls, SvdConfig):
        raise SvdtuneError(f"{folder} holds an adapter of type {peft_type}; expected one of SARA, MOSARA or SORSA")
    try:
        return cls.from_pretrained(str(folder))
    except SvdtuneError:
        raise
    except (
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        OverflowError,
    ) as error:  # PEFT's own, of a kind that is none
        raise SvdtuneError(f"{path} is damaged: {str(error)[:200]}") from error


def layer_class(config: SvdConfig) -> type[SvdLayer]:
    """The layer of a configuration's method."""
    return PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type].tuner_layer_cls
