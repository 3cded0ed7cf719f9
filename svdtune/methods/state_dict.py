"""StateDictTuner takes an adapter's tensors out of a model to save them, and puts a file's tensors
into a model.

A file may fill what its configuration implies and nothing else. A refused file leaves the model as
it was.
"""

import warnings
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn

from svdtune.errors import SvdtuneError
from svdtune.methods.compute.together import Together
from svdtune.methods.config import SvdConfig
from svdtune.methods.files.compact import leave_out, restore
from svdtune.methods.files.integrity import PEFT_ROOT, check_finite, check_tensor_names, check_tensors
from svdtune.methods.layers.base import SvdLayer
from svdtune.spectra.content import content_key


class StateDictTuner(BaseTuner):
    """The part of a tuner that saves and loads."""

    tuner_layer_cls: type[SvdLayer[Any]]
    together: Together | None = None

    def adapted_layers(self) -> Iterator[SvdLayer[Any]]:
        """The adapted layers. (Not `layers`: that name must reach the base model, as any attribute
        the tuner lacks does.)"""
        return (module for module in self.model.modules() if isinstance(module, self.tuner_layer_cls))

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        *args: Any,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        found = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, *args, **kwargs)
        check_finite(found, saving=True)
        _check_written_by_peft(model)
        kept = ours(config)
        # typed as a class variable, so that the dataclass does not take it for a setting
        kept.last_taken = cls._some_of(found, model, adapter_name)  # type: ignore[misc]
        kept.embedding_weights = embedding_weights(model)  # type: ignore[misc]
        if kept.compact:
            for name, layer in model.named_modules():
                if isinstance(layer, cls.tuner_layer_cls) and adapter_name in layer.r:
                    leave_out(found, name, layer, adapter_name)
        return found

    @classmethod
    def _some_of(cls, state_dict: dict[str, Tensor], model: nn.Module, adapter: str) -> dict[str, str]:
        """Digests of the smallest trained tensor of every layer, by their names in the file.
        Training changes all of them."""
        found = {}
        for name, layer in model.named_modules():
            if isinstance(layer, cls.tuner_layer_cls) and adapter in layer.r:
                keys = [f"{name}.{part}.{adapter}" for part in layer.trained]
                there = [key for key in keys if key in state_dict and not state_dict[key].is_meta]
                if not there:  # under another wrapper's names, or not loaded yet
                    continue
                smallest = min(there, key=lambda key: state_dict[key].numel())
                found[cls._remove_adapter_name_from_key(smallest, adapter)] = content_key(state_dict[smallest])
        return found

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        _leave_out_twice_saved(remapped, model, adapter_name)
        given: dict[str, tuple[SvdLayer[Any], dict[str, Tensor]]] = {}
        for name, layer in model.named_modules():
            if isinstance(layer, cls.tuner_layer_cls) and adapter_name in layer.r:
                keys = {part: f"{name}.{part}.{adapter_name}" for part in (*layer.trained, *layer.frozen)}
                given[name] = layer, {part: remapped[key] for part, key in keys.items() if key in remapped}
        try:
            restore(remapped, given, adapter_name)
            for name, (layer, tensors) in given.items():
                check_tensors(name.removeprefix(PEFT_ROOT), layer.adapter_tensors(adapter_name), tensors)
            bare = {key.removeprefix(PEFT_ROOT): tensor for key, tensor in remapped.items()}
            # A program may hand over its own biases; a file says in its configuration what it has.
            of_file = ours(config).svdtune_version is not None
            named = {key: tensor for key, tensor in bare.items() if of_file or not key.endswith(".bias")}
            check_tensor_names(cls._loadable(model, ours(config), adapter_name), named)
            check_finite(bare, saving=False)
        except SvdtuneError:
            cls._take_back(model, adapter_name)
            raise
        for name, (layer, tensors) in given.items():
            own = {f"{name}.{part}.{adapter_name}" for part in tensors}
            layer.fill(adapter_name, tensors, own)
            for key in own:
                del remapped[key]
        names = {layer: name for name, (layer, _) in given.items()}
        for name, layer in model.named_modules(remove_duplicate=False):
            if isinstance(layer, cls.tuner_layer_cls) and name != names.get(layer, name):
                # a module that stands in several places is saved in the first
                tensors = given[names[layer]][1]
                remapped |= {f"{name}.{part}.{adapter_name}": tensor for part, tensor in tensors.items()}
        return remapped

    @classmethod
    def _loadable(cls, model: nn.Module, config: SvdConfig, adapter: str) -> dict[str, Tensor]:
        """The tensors of the model that an adapter's file may fill, by name without PEFT's
        prefix."""
        state = model.state_dict()
        names = set(cls._get_learnable_bias_state_dict(model, state, config))
        for name, module in model.named_modules():
            if isinstance(module, cls.tuner_layer_cls):
                names |= {f"{name}.{part}.{adapter}" for part in (*module.trained, *module.frozen)}
            elif isinstance(module, AuxiliaryTrainingWrapper):
                names |= {f"{name}.{key}" for key in module.adapter_state_dict_load_map(adapter).values()}
        found = {name.removeprefix(PEFT_ROOT): state[name] for name in names if name in state}
        if config.embeddings is not False:
            weights = embedding_weights(model)
            found |= {bare: state[name] for name in state if (bare := name.removeprefix(PEFT_ROOT)) in weights}
        return found

    @classmethod
    def _take_back(cls, model: Any, adapter_name: str) -> None:
        """Remove an adapter that was put on to be loaded. The model is then as it was."""
        tuner = getattr(model, "base_model", None)
        if not isinstance(tuner, StateDictTuner):
            tuner = cls._over(model)
        if not any(layer.awaits(adapter_name) for layer in tuner.adapted_layers()):
            return
        assert tuner.together is not None  # since the adapter was put on
        if len(tuner.peft_config) > 1:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", f"Adapter {adapter_name} was active which is now deleted")
                (model if isinstance(model, PeftModel) else tuner).delete_adapter(adapter_name)
            return
        trained_before = tuner.together.trained_before
        tuner.unload()
        for parameter in trained_before:
            parameter.requires_grad_(True)
        if hasattr(model, "_hf_peft_config_loaded"):
            model._hf_peft_config_loaded = False

    @classmethod
    def _over(cls, model: nn.Module) -> "StateDictTuner":
        """A tuner for a model that Transformers put adapters into. Transformers keeps none."""
        tuner = cls.__new__(cls)
        nn.Module.__init__(tuner)
        tuner.model = model
        tuner.together = next((layer.together for layer in tuner.adapted_layers()), None)
        return tuner


def _check_written_by_peft(model: nn.Module) -> None:
    """Refuse a model of diffusers, whose `save_lora_adapter` and `save_lora_weights` take an
    adapter's tensors like this.

    Raises:
        SvdtuneError: with what to do.
    """
    if not isinstance(model, PeftModel) and hasattr(type(model), "save_lora_adapter"):
        raise SvdtuneError(
            f"{type(model).__name__} belongs to diffusers, whose files hold LoRA and nothing else: what it saves of this "
            "adapter it cannot load. Put the adapter on with peft.get_peft_model(model, config) and save it with that model's "
            "save_pretrained; PeftModel.from_pretrained loads it"
        )


def _leave_out_twice_saved(tensors: dict[str, Tensor], model: nn.Module, adapter: str) -> None:
    """Drop the second copy of embeddings that were resized and are trained whole. PEFT saves it
    under a name without the adapter's."""
    for name, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            for key, own in module.adapter_state_dict_load_map(adapter).items():
                again, first = f"{name}.modules_to_save.{key}", tensors.get(f"{name}.{own}")
                if first is not None and again in tensors and torch.equal(first, tensors[again]):
                    del tensors[again]


def embedding_weights(model: Any) -> set[str]:
    """The names of the weights that PEFT saves where the vocabulary was resized."""
    found = []
    for ask in ("get_input_embeddings", "get_output_embeddings"):
        with suppress(AttributeError, NotImplementedError):  # not of a language model
            found.append(getattr(model, ask)())
    named = model.named_modules(remove_duplicate=False)
    names = {name.removeprefix(PEFT_ROOT) for name, module in named if any(module is one for one in found)}
    return {f"{name}{part}.weight" for name in names for part in ("", ".base_layer", ".original_module")}


def ours(config: PeftConfig) -> SvdConfig:
    """A configuration that PEFT hands to one of svdtune's tuners, typed as svdtune's."""
    assert isinstance(config, SvdConfig)
    return config
