"""Read a saved adapter from its folder: its configuration, and its tensors by layer; no model is
needed."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
from peft import PeftConfig, PeftType, TaskType
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from svdtune.checkpoint.tensors import read_shard
from svdtune.errors import SvdtuneError
from svdtune.methods.config import SvdConfig
from svdtune.methods.files.compact import PROBE
from svdtune.methods.files.integrity import ADAPTER_CONFIG, ADAPTER_WEIGHTS, PEFT_ROOT
from svdtune.methods.layers.base import SvdLayer
from svdtune.methods.registration import config_class
from svdtune.registry import lab_note
from svdtune.system import read_json

# What PEFT says of a damaged configuration, in whichever of these types.
_PEFTS_OWN = (ValueError, TypeError, KeyError, AttributeError, OverflowError, OSError)


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter as it lies on disk.

    Attributes:
        config: its configuration.
        layers: by module name, the layer's tensors by their names in `trained` and `frozen`; of a
            compact adapter, probes in the place of frozen ones.
        others: the rest of the file under its own names: biases and modules_to_save.
    """

    config: SvdConfig
    layers: dict[str, dict[str, Tensor]]
    others: dict[str, Tensor]


def read_adapter(folder: str | Path) -> SavedAdapter:
    """Read an adapter of svdtune's from a folder that `save_pretrained` wrote.

    Raises:
        SvdtuneError: there is none, it is another method's, it is damaged, or tensors of a layer
            are missing.
    """
    folder = Path(folder).expanduser()
    config = read_config(folder)
    if not isinstance(config, SvdConfig):
        kind = PeftType(config.peft_type).value
        raise SvdtuneError(f"{folder} holds an adapter of type {kind}; expected one of SARA, MOSARA or SORSA")
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
        layer, _, part = key.removeprefix(PEFT_ROOT).rpartition(".")
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


def read_settings(folder: Path) -> dict[str, Any]:
    """The content of an adapter's adapter_config.json, of any method, unchanged.

    Raises:
        SvdtuneError: there is none, it is damaged, or PEFT does not know the method.
    """
    path = folder / ADAPTER_CONFIG
    if not path.is_file():
        found = "that folder does not exist" if not folder.is_dir() else f"it has no {ADAPTER_CONFIG}"
        raise SvdtuneError(f"{folder} is not an adapter folder: {found}")
    settings = read_json(path)
    if config_class(str(settings.get("peft_type"))) is None:
        raise SvdtuneError(
            f"{folder} holds an adapter of type {settings.get('peft_type')}, which PEFT {peft.__version__} does not know; "
            f"upgrade PEFT, or see whether {path.name} is damaged{lab_note()}"
        )
    return settings


def read_config(folder: Path) -> PeftConfig:
    """The configuration of a saved adapter of any method. For svdtune's methods it also checks that
    the weights are whole.

    Raises:
        SvdtuneError: there is none, it is damaged, or PEFT does not know the method.
    """
    cls = config_class(str(read_settings(folder)["peft_type"]))
    assert cls is not None
    try:
        return cls.from_pretrained(str(folder))
    except SvdtuneError:
        raise
    except _PEFTS_OWN as error:
        raise SvdtuneError(f"{folder / ADAPTER_CONFIG} is damaged: {str(error)[:200]}") from error


_BY_TASK = {
    TaskType.SEQ_CLS: "AutoModelForSequenceClassification",
    TaskType.TOKEN_CLS: "AutoModelForTokenClassification",
    TaskType.QUESTION_ANS: "AutoModelForQuestionAnswering",
    TaskType.FEATURE_EXTRACTION: "AutoModel",  # features come from the model without a head
}


def architecture_of(config: PeftConfig) -> str | None:
    """The class of Transformers that an adapter is for; None for the one that the base's own
    configuration names. An adapter that was saved without a task says for which it was made."""
    named = (config.auto_mapping or {}).get("base_model_class")
    return named or (None if config.task_type is None else _BY_TASK.get(TaskType(config.task_type)))


def labels_of(folder: Path) -> int | None:
    """How many outputs the classifier has that was saved with an adapter; None where there is
    none."""
    heads = ("score.weight", "classifier.weight", "classifier.out_proj.weight", "qa_outputs.weight")
    tensors = read_shard(folder, ADAPTER_WEIGHTS).tensors if (folder / ADAPTER_WEIGHTS).is_file() else {}
    return next((tensor.shape[0] for name, tensor in tensors.items() if name.endswith(heads)), None)


def layer_class(config: SvdConfig) -> type[SvdLayer[Any]]:
    """The layer of a configuration's method."""
    cls = PEFT_TYPE_TO_TUNER_MAPPING[PeftType(config.peft_type)].tuner_layer_cls
    assert issubclass(cls, SvdLayer)
    return cls
