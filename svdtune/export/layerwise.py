"""Merge one layer at a time: PEFT's own merge, on a model that consists of that layer alone.

So every method, layer kind and check is the same as in memory: nothing is written a second time for
merging from disk.
"""

import copy
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, PeftType, set_peft_model_state_dict
from torch import Tensor, nn

from svdtune.checkpoint.tensors import read_shard
from svdtune.errors import SvdtuneError
from svdtune.methods.config import SvdConfig
from svdtune.methods.files.integrity import ADAPTER_WEIGHTS, PEFT_ROOT, check_same_layers
from svdtune.starts.pairs import check_repeated

# Settings that choose layers among many, or train something beside them: a model of one layer has
# neither.
_ONE_LAYER = {
    "exclude_modules": None,
    "layers_to_transform": None,
    "layers_pattern": None,
    "modules_to_save": None,
    "bias": "none",
    "base_model_name_or_path": None,
    "task_type": None,
    "inference_mode": True,
}
IN_MEMORY = "merge in memory: PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(folder)"


class LayerwiseAdapter:
    """An adapter on disk, merged layer by layer.

    Attributes:
        layers: the modules it adapts, each with the keys of its tensors in the file.
        replaced: parameters of the base model that it replaces as they are (biases,
            modules_to_save), by name, each with its key in the file.
    """

    def __init__(self, folder: Path, config: PeftConfig, base: nn.Module):
        """Read the names in the adapter's file.

        Args:
            folder: of a saved adapter of any PEFT method that merges.
            config: its configuration.
            base: the base model; its parameters may be on the meta device.

        Raises:
            SvdtuneError: the adapter is damaged, was made for another model, or changes no weight.
        """
        if config.is_prompt_learning:
            raise SvdtuneError(
                f"the adapter {folder} is {PeftType(config.peft_type).value}, which changes no weight and cannot be merged"
            )
        check_repeated(folder, config)
        self.folder, self.config = folder, config
        self._tensors = read_shard(folder, ADAPTER_WEIGHTS).tensors
        self.layers: dict[str, list[str]] = {}
        self.replaced: dict[str, str] = {}
        modules = dict(base.named_modules())
        for key in self._tensors:
            layer, rest = _split(key.removeprefix(PEFT_ROOT), modules)
            if self._is_of_wrapper(layer, rest, modules):
                continue
            homeless = "weight" not in modules[layer]._parameters and rest not in modules[layer]._parameters
            if homeless or rest.startswith("token_adapter."):
                raise SvdtuneError(
                    f"the adapter {folder} was made for another model, or trains what lies in no single layer: this one has no "
                    f"module for {key!r}. Name the base model that it was trained on. If this is it (VeRA's shared matrices, "
                    "target_parameters, trainable_token_indices, layer_replication), "
                    f"{IN_MEMORY}"
                )
            parameter = f"{layer}.{rest.removeprefix('base_layer.')}"
            if parameter.removeprefix(f"{layer}.") in modules[layer]._parameters:
                self.replaced[parameter] = key
            else:
                self.layers.setdefault(layer, []).append(key)
        for layer in self.layers:  # adapted embeddings are saved with the base's own weight
            self.replaced.pop(f"{layer}.weight", None)
        if isinstance(self.config, SvdConfig):
            check_same_layers(
                {self.config.module_of(name): rank for name, rank in self.config.ranks.items()}, self.layers
            )
        self._modules = {layer: modules[layer] for layer in self.layers}

    def _is_of_wrapper(self, layer: str, rest: str, modules: Mapping[str, nn.Module]) -> bool:
        """Whether a tensor is one that PEFT saves beside the weight of resized embeddings that are
        trained whole: the same again, or what it was before."""
        wrapped, _, name = rest.partition(".")
        return (
            wrapped in ("modules_to_save", "original_module")
            and wrapped not in modules[layer]._modules
            and any(f"{root}{layer}.{name}" in self._tensors for root in ("", PEFT_ROOT))
        )

    def read(self, parameter: str) -> Tensor:
        """The tensor that takes the place of one of `replaced`."""
        return self._tensors[self.replaced[parameter]].read()

    def merged(self, layer: str, weight: Tensor) -> Tensor:
        """The weight of one layer with the adapter in it, rounded once to fp32 (fp64 for fp64).

        Args:
            layer: its name in the base model.
            weight: the base model's, as its checkpoint stores it.

        Raises:
            SvdtuneError: another base model's weight, an adapter that is no matrix (Mo-SARA with
                several heads) or one with NaN or infinity.
        """
        module = copy.deepcopy(self._modules[layer])
        # PEFT merges in place
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)
        module.weight = nn.Parameter(weight, requires_grad=False)
        if getattr(module, "bias", None) is not None:
            module.bias = nn.Parameter(torch.ones(module.bias.shape), requires_grad=False)
        try:
            with warnings.catch_warnings():
                # what PEFT says of a model without a configuration
                warnings.simplefilter("ignore", UserWarning)
                model = PeftModel(_holding(layer, module), self._config_of(layer))
                loaded = set_peft_model_state_dict(
                    model, {key: self._tensors[key].read() for key in self.layers[layer]}
                )
                self._check_loaded(layer, model, loaded)
                model.merge_adapter(safe_merge=True)
        except SvdtuneError:
            raise
        except (ValueError, NotImplementedError, AttributeError, RuntimeError, TypeError) as error:
            raise SvdtuneError(f"the adapter {self.folder} cannot be merged into {layer!r}: {error}") from error
        merged: Any = model.get_base_model().get_submodule(layer)
        found = merged.get_base_layer()
        if getattr(found, "bias", None) is not None and not (found.bias == 1).all():
            raise SvdtuneError(
                f"the adapter {self.folder} changes the bias of {layer!r} too, and weights alone are merged here; {IN_MEMORY}"
            )
        return found.weight.detach()

    def _config_of(self, layer: str) -> PeftConfig:
        """The configuration of an adapter that has this layer alone."""
        config = copy.deepcopy(self.config)
        for name, value in ({"target_modules": [layer]} | _ONE_LAYER).items():
            if hasattr(config, name):
                setattr(config, name, value)
        if isinstance(config, SvdConfig):
            config.ranks = {name: rank for name, rank in config.ranks.items() if config.module_of(name) == layer}
        return config

    def _check_loaded(self, layer: str, model: PeftModel, loaded: Any) -> None:
        lacking = [key for key in loaded.missing_keys if model.base_model.prefix in key]
        if lacking or loaded.unexpected_keys:
            first = f"the file lacks {lacking[0]}" if lacking else f"there is no place for {loaded.unexpected_keys[0]}"
            raise SvdtuneError(f"the adapter {self.folder} does not fit layer {layer!r}: {first}")


def _split(key: str, modules: Mapping[str, nn.Module]) -> tuple[str, str]:
    """The module that a key lies in, as deep as there is one, and the rest of the key."""
    parts = key.split(".")
    for length in range(len(parts) - 1, 0, -1):
        if (name := ".".join(parts[:length])) in modules:
            return name, ".".join(parts[length:])
    return "", key


def _holding(path: str, module: nn.Module) -> nn.Module:
    """A model with one module, under its path."""
    *parents, last = path.split(".")
    root = node = nn.Module()
    for name in parents:
        child = nn.Module()
        node.add_module(name, child)
        node = child
    node.add_module(last, module)
    return root
