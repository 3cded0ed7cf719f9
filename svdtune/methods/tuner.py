"""SvdTuner: how the three methods enter a model through PEFT: which layers, which ranks, which
factors, loading, merging.

Ranks and factors are settled for all target layers together before any layer is replaced, so that a
layer that cannot be decomposed leaves the model as it was, and the disk cache and the progress bar
see the whole job.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any, cast

from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _ExcludedModule, _maybe_include_all_linear_layers
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from svdtune import processes
from svdtune.errors import SvdtuneError
from svdtune.methods.closed import WAY_ROUND
from svdtune.methods.compute.together import Together
from svdtune.methods.config import SvdConfig, as_set
from svdtune.methods.files.compact import leave_out, restore
from svdtune.methods.files.integrity import (
    PEFT_ROOT,
    check_base,
    check_finite,
    check_names,
    check_same_layers,
    check_tensors,
)
from svdtune.methods.firstuse import forget_first_use, watch_first_use
from svdtune.methods.layers.base import SvdLayer, parameters_go_to_meta
from svdtune.methods.layers.quantized import backend_of, device_and_dtype
from svdtune.methods.layers.slices import FusedLinear, RowSlice
from svdtune.methods.resolution import Resolution, check_called
from svdtune.spectra import sharing


class SvdTuner(BaseTuner):
    """A base model with adapters of one method; PEFT makes it inside `get_peft_model` and
    `PeftModel.from_pretrained`."""

    tuner_layer_cls: type[SvdLayer[Any]]
    together: Together | None = None
    target_module_mapping: dict[str, list[str]] = cast(Any, TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING)

    # Before injection: which layers, which ranks, which factors

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """As PEFT's, with every rank and factor settled first; see the head of this file."""
        config = _ours(self.peft_config[adapter_name])
        trained_before = [parameter for parameter in model.parameters() if parameter.requires_grad]
        load_only = low_cpu_mem_usage or config.initialized or parameters_go_to_meta()
        self._resolution = Resolution(config, model, self.tuner_layer_cls, load_only)
        # PEFT takes the modules' names from the keys, and a slice is no module yet
        if state_dict is not None:
            keys = {key: key.rpartition(".") for key in state_dict}
            state_dict = {f"{config.module_of(at)}.{part}": state_dict[key] for key, (at, _, part) in keys.items()}
        try:
            same_draws = processes.same_draws if sharing.is_on() and not load_only else nullcontext
            with warnings.catch_warnings(), same_draws():
                # PEFT looks at modules alone; `check_patterns` at slices too
                warnings.filterwarnings("ignore", "The following rank_pattern keys did not match")
                super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
            self._watch(model, trained_before)
            self._resolution.check_patterns()
            self._resolution.record()
        except SvdtuneError:
            if isinstance(model, PreTrainedModel):  # whose adapters the tuner took as its own
                self.peft_config.pop(adapter_name, None)
            raise
        finally:
            self._resolution.factors.clear()

    def _watch(self, model: nn.Module, trained_before: list[nn.Parameter]) -> None:
        # Transformers makes a tuner for each adapter
        there = (layer.together for layer in self.adapted_layers() if layer.together is not None)
        self.together = self.together or next(there, None) or Together()
        self.together.trained_before = trained_before
        self.together.watch(model)
        layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, self.tuner_layer_cls)}
        for layer in layers.values():
            layer.together = self.together
        watch_first_use(model, layers)

    # PEFT's is annotated with None, and returns the model
    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:  # type: ignore[override]
        assert self.together is not None  # since the first adapter was put on
        self.together.leave(self.model)
        forget_first_use(self.model)
        return cast(nn.Module, super()._unload_and_optionally_merge(*args, **kwargs))

    def _prepare_model(self, peft_config: PeftConfig, model: nn.Module) -> None:
        """Settle the ranks and factors of every target layer, before PEFT replaces the first."""
        config = self._named_layers(_ours(peft_config), model)
        check_called(model, [name for name, _ in self._targets(config, model)])
        targets = dict(self._resolution.layers(dict(self._targets(config, model))))
        if config.initialized:
            check_same_layers(config.ranks, targets)
            if self._resolution.present:
                check_base(config.base_fingerprint, targets)
        self._resolution.decide(targets)

    def _named_layers(self, config: SvdConfig, model: nn.Module) -> SvdConfig:
        """The configuration with "all-linear" spelled out. PEFT takes each layer's whole name,
        which `layers_to_transform` does not look into, so that is applied here."""
        shorthand = config.target_modules
        config = _ours(_maybe_include_all_linear_layers(config, model))
        names = config.target_modules
        if (
            isinstance(shorthand, str)
            and not isinstance(names, str)
            and names is not None
            and config.layers_to_transform is not None
        ):
            config.target_modules = as_set(name.rpartition(".")[2] for name in names)
            chosen = {name for name in names if self._check_target_module_exists(config, name)}
            config.target_modules = as_set(chosen or names)
        return config

    def _targets(self, config: SvdConfig, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        inside: list[str] = []
        for name, module in model.named_modules():
            if not name or any(name.startswith(prefix) for prefix in inside):
                continue
            if isinstance(module, BaseTunerLayer):
                inside.append(name + ".")
            matched = self._check_target_module_exists(config, name)
            if matched and not isinstance(matched, _ExcludedModule):
                yield name, module

    # Injection

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        *_: Any,
        **__: Any,
    ) -> None:
        config = _ours(peft_config)
        if current_key in self._resolution.parts:
            self._adapt_slices(config, adapter_name, target, target_name, parent, current_key)
            return
        # PEFT found the layer in a state dict, not by the configuration
        if current_key not in self._resolution.ranks:
            self._resolution.decide({current_key: target})
        layer = self._adapted(config, adapter_name, target, current_key)
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)

    def _adapt_slices(
        self,
        config: SvdConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
    ) -> None:
        fused = target if isinstance(target, FusedLinear) else FusedLinear(target)
        for part, rows in self._resolution.parts[current_key].items():
            before = fused.slice(part) or RowSlice(fused.get_base_layer(), rows)
            layer = self._adapted(config, adapter_name, before, f"{current_key}.{part}")
            if layer is not before:
                fused.add_module(part, layer)
        if fused is not target:
            self._replace_module(parent, target_name, fused, target)

    def _adapted(self, config: SvdConfig, adapter_name: str, target: nn.Module, name: str) -> SvdLayer[Any]:
        """The layer `target` with one more adapter; a new layer around it where it has none yet."""
        layer = target if isinstance(target, self.tuner_layer_cls) else self.tuner_layer_cls(target)
        if layer is not target:
            layer._active_adapter = adapter_name
            layer.tied = id(getattr(layer.get_base_layer(), "weight", None)) in self._resolution.shared
            layer.quantization_backend = backend_of(layer.get_base_layer(), self.model)
        factors = self._resolution.factors.pop(name, None)
        # Without the weights, the adapter's values come from the main process when the model is
        # sharded.
        weightless = not self._resolution.load_only and not self._resolution.present
        load_only = self._resolution.load_only or weightless
        layer.update_layer(adapter_name, self._resolution.ranks[name], config, factors, load_only)
        if weightless:
            layer.filled_elsewhere(adapter_name)
        if config.compact and factors is not None:
            layer.recomputable.add(adapter_name)
        if layer is not target and adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        return layer

    def _check_merge_allowed(self) -> None:
        """PEFT warns here of tied weights; merging one of ours leaves the other modules' weight
        alone."""

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """As PEFT's, which on unloading expects every layer to have a weight; HQQ's have none."""
        if hasattr(new_module, "W_q"):
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """fp32 factors whatever the base dtype, unless `autocast_adapter_dtype=False` asks for the
        base's own.

        Frozen factors stay as they are: rounding them would make them another weight's.
        """
        if autocast_adapter_dtype:
            return super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        for layer in self.adapted_layers():
            dtype = device_and_dtype(layer.get_base_layer())[1]
            for name in layer.trained:
                tensors = getattr(layer, name)
                if adapter_name in tensors and dtype.is_floating_point:
                    tensors[adapter_name] = nn.Parameter(
                        tensors[adapter_name].detach().to(dtype), requires_grad=tensors[adapter_name].requires_grad
                    )

    def add_weighted_adapter(self, *_: Any, **__: Any) -> None:
        """Not there: a weighted sum of adapters is in general no adapter of these methods.

        Raises:
            SvdtuneError: always, with the way round.
        """
        raise SvdtuneError(
            "a weighted sum of SARA, Mo-SARA or SORSA adapters is no such adapter again. Save them and combine them into one "
            "LoRA, exactly or cut to a rank: `svdtune combine first=0.7 second=0.3 --output combined`, or in Python "
            "svdtune.combine({'first': 0.7, 'second': 0.3}, 'combined')"
        )

    @contextmanager
    def _enable_peft_forward_hooks(self, *_: Any, **kwargs: Any) -> Iterator[None]:
        """What PEFT calls around a forward pass that may name an adapter for each sample, which it
        knows for LoRA alone."""
        if kwargs.get("adapter_names") is not None:
            raise SvdtuneError(
                f"`adapter_names`, an adapter for each sample of a batch, is there for LoRA alone. {WAY_ROUND}; or call the "
                "model once for each adapter, with set_adapter before"
            )
        yield

    def adapted_layers(self) -> Iterator[SvdLayer[Any]]:
        """The adapted layers. (Not `layers`: that name must reach the base model, as any attribute
        the tuner lacks does.)"""
        return (module for module in self.model.modules() if isinstance(module, self.tuner_layer_cls))

    # Saving and loading

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
        ours = _ours(config)
        # a class variable, lest the dataclass take it for a setting
        ours.last_taken = cls._some_of(found, model, adapter_name)  # type: ignore[misc]
        ours.embedding_weights = _embedding_weights(model)  # type: ignore[misc]
        if ours.compact:
            for name, layer in model.named_modules():
                if isinstance(layer, cls.tuner_layer_cls) and adapter_name in layer.r:
                    leave_out(found, name, layer, adapter_name)
        return found

    @classmethod
    def _some_of(cls, state_dict: dict[str, Tensor], model: nn.Module, adapter: str) -> dict[str, Tensor]:
        """The smallest trained tensor of every layer, under the names that the file will have:
        training changes them all."""
        found = {}
        for name, layer in model.named_modules():
            if isinstance(layer, cls.tuner_layer_cls) and adapter in layer.r:
                keys = [f"{name}.{part}.{adapter}" for part in layer.trained]
                there = [key for key in keys if key in state_dict and not state_dict[key].is_meta]
                if not there:  # under another wrapper's names, or not loaded yet
                    continue
                smallest = min(there, key=lambda key: state_dict[key].numel())
                found[cls._remove_adapter_name_from_key(smallest, adapter)] = (
                    state_dict[smallest].detach().cpu().clone()
                )
        return found

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
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
            of_file = _ours(config).svdtune_version is not None
            named = {key: tensor for key, tensor in bare.items() if of_file or not key.endswith(".bias")}
            check_names(cls._loadable(model, _ours(config), adapter_name), named)
            check_finite(bare, saving=False)
        except SvdtuneError:
            cls._take_back(model, adapter_name)
            raise
        for layer, _ in given.values():
            layer.before_load(adapter_name)
        return remapped

    @classmethod
    def _loadable(cls, model: nn.Module, config: SvdConfig, adapter: str) -> dict[str, Tensor]:
        """The model's tensors that an adapter's file may fill, by name without PEFT's prefix."""
        state = model.state_dict()
        names = set(cls._get_learnable_bias_state_dict(model, state, config))
        for name, module in model.named_modules():
            if isinstance(module, cls.tuner_layer_cls):
                names |= {f"{name}.{part}.{adapter}" for part in (*module.trained, *module.frozen)}
            elif isinstance(module, AuxiliaryTrainingWrapper):
                names |= {f"{name}.{key}" for key in module.adapter_state_dict_load_map(adapter).values()}
        found = {name.removeprefix(PEFT_ROOT): state[name] for name in names if name in state}
        if config.embeddings is not False:
            weights = _embedding_weights(model)
            found |= {bare: state[name] for name in state if (bare := name.removeprefix(PEFT_ROOT)) in weights}
        return found

    @classmethod
    def _take_back(cls, model: Any, adapter_name: str) -> None:
        """Remove an adapter that was put on a model in order to be loaded, so that the model is as
        it was."""
        tuner = getattr(model, "base_model", None)
        if not isinstance(tuner, SvdTuner):
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
    def _over(cls, model: nn.Module) -> "SvdTuner":
        """A tuner of a model that Transformers put adapters into, which keeps none."""
        tuner = cls.__new__(cls)
        nn.Module.__init__(tuner)
        tuner.model = model
        tuner.together = next((layer.together for layer in tuner.adapted_layers()), None)
        return tuner


def _embedding_weights(model: Any) -> set[str]:
    """The names of the weights that PEFT saves where the vocabulary was resized."""
    found = []
    for ask in ("get_input_embeddings", "get_output_embeddings"):
        with suppress(AttributeError, NotImplementedError):  # not of a language model
            found.append(getattr(model, ask)())
    named = model.named_modules(remove_duplicate=False)
    names = {name.removeprefix(PEFT_ROOT) for name, module in named if any(module is one for one in found)}
    return {f"{name}{part}.weight" for name in names for part in ("", ".base_layer")}


def _ours(config: PeftConfig) -> SvdConfig:
    """A configuration that PEFT hands to a tuner of ours, which is one of ours."""
    assert isinstance(config, SvdConfig)
    return config
