"""SvdTuner: how the three methods enter a model through PEFT.

The ranks and factors of all target layers are settled before the first layer is replaced. So a
layer that cannot be decomposed leaves the model as it was, and the disk cache and the progress bar
see the whole job.
"""

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, cast

from accelerate import init_empty_weights
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer, _ExcludedModule, _maybe_include_all_linear_layers
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from transformers import PreTrainedModel

from svdtune import processes
from svdtune.errors import SvdtuneError
from svdtune.methods.compute.together import Together
from svdtune.methods.config import SvdConfig, as_set
from svdtune.methods.experts import asked_stacks, say_experts_left_out
from svdtune.methods.files.integrity import check_base, check_same_layers
from svdtune.methods.first_use import forget_first_use, watch_first_use
from svdtune.methods.layers.base import SvdLayer
from svdtune.methods.layers.experts import FusedExperts
from svdtune.methods.layers.quantization import backend_of, device_and_dtype
from svdtune.methods.layers.samples import BASE, Samples
from svdtune.methods.layers.slices import FusedLinear, RowSlice
from svdtune.methods.layers.state_dict import parameters_go_to_meta
from svdtune.methods.resolution import Resolution, check_called, shared_places
from svdtune.methods.state_dict import StateDictTuner, ours
from svdtune.spectra import sharing

# TRL's name for the copy of a trained adapter that training starts from, the reference of DPO, KTO
# and GRPO. TRL puts it on with the original's configuration, and then copies by names in which
# something follows the adapter's, as in LoRA's `lora_A.default.weight`.
REFERENCE = "ref"
# Of whole modules, those that PEFT computes with another copy for each sample.
_NAMED = 8  # adapters that a message lists; a model can have a thousand
BY_SAMPLE = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class SvdTuner(StateDictTuner):
    """A base model with adapters of one method; PEFT makes it inside `get_peft_model` and
    `PeftModel.from_pretrained`."""

    _places: dict[nn.Module, list[tuple[nn.Module, str]]]
    target_module_mapping: dict[str, list[str]] = cast(Any, TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING)

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any):
        super().__init__(_compiled_in_place(model), *args, **kwargs)

    # Before injection: which layers, which ranks, which factors

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """As PEFT's. Every rank and factor is settled first; see the head of this file."""
        config = ours(self.peft_config[adapter_name])
        trained_before = [parameter for parameter in model.parameters() if parameter.requires_grad]
        load_only = low_cpu_mem_usage or config.initialized or parameters_go_to_meta()
        self._resolution = Resolution(config, model, self.tuner_layer_cls, load_only)
        self._places = shared_places(model)
        # PEFT reads the modules' names off the keys, and slices are no modules yet
        if config.target_parameters:
            state_dict = None  # PEFT finds parameters by the configuration alone
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
            self._copy_if_reference(adapter_name)
            self._resolution.check_patterns()
            self._resolution.record()
            if not config.initialized:  # Transformers before 5.10 or so remembers it
                config.revision = config.revision or getattr(getattr(model, "config", None), "_commit_hash", None)
        except SvdtuneError:
            if isinstance(model, PreTrainedModel):  # whose adapters the tuner took as its own
                self.peft_config.pop(adapter_name, None)
            raise
        finally:
            self._resolution.factors.clear()

    def _copy_if_reference(self, adapter_name: str) -> None:
        """If this adapter is TRL's copy of another one, give it the other's values."""
        config = self.peft_config[adapter_name]
        alike = (name for name, other in self.peft_config.items() if other is config and name != adapter_name)
        original = next(alike, None)
        if adapter_name == REFERENCE and original is not None:
            for layer in self.adapted_layers():
                layer.fill(adapter_name, layer.adapter_tensors(original), ())

    def _watch(self, model: nn.Module, trained_before: list[nn.Parameter]) -> None:
        # Transformers makes a new tuner for each adapter
        there = (layer.together for layer in self.adapted_layers() if layer.together is not None)
        self.together = self.together or next(there, None) or Together()
        self.together.trained_before = trained_before
        self.together.watch(model)
        layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, self.tuner_layer_cls)}
        for layer in layers.values():
            layer.together = self.together
            layer.keep_values()
        watch_first_use(model, layers)

    # PEFT's is annotated with None, and returns the model
    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:  # type: ignore[override]
        assert self.together is not None  # since the first adapter was put on
        self.together.leave(self.model)
        forget_first_use(self.model)
        self._places = shared_places(self.model)
        # PEFT puts back a module of modules_to_save whole, with adapted layers: unload those first.
        for wrapper in [module for module in self.model.modules() if isinstance(module, ModulesToSaveWrapper)]:
            inside = cast(SvdTuner, self._over(wrapper))
            inside._places, inside.peft_config = self._places, self.peft_config
            super(SvdTuner, inside)._unload_and_optionally_merge(*args, **kwargs)
        return cast(nn.Module, super()._unload_and_optionally_merge(*args, **kwargs))

    def _prepare_model(self, peft_config: PeftConfig, model: nn.Module) -> None:
        """Settle the ranks and factors of every target layer, before PEFT replaces the first."""
        own = ours(peft_config)
        stacks = asked_stacks(model, own)
        if not own.initialized:
            say_experts_left_out(model, own.target_modules, stacks)
        config = self._named_layers(ours(peft_config), model)
        check_called(model, [name for name, _ in self._targets(config, model)])
        targets = dict(self._resolution.layers(dict(self._targets(config, model))))
        targets |= self._resolution.experts_of(stacks)
        if config.initialized:
            check_same_layers(config.ranks, targets)
            if self._resolution.present:
                check_base(config.base_fingerprint, targets)
        self._resolution.decide(targets)

    def _named_layers(self, config: SvdConfig, model: nn.Module) -> SvdConfig:
        """The configuration with "all-linear" spelled out.

        PEFT then takes each layer's whole name, and ignores `layers_to_transform` for it. So that
        is applied here.
        """
        shorthand = config.target_modules
        config = ours(_maybe_include_all_linear_layers(config, model))
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
        config = ours(peft_config)
        adapted: nn.Module
        if current_key in self._resolution.parts:
            adapted = fused = target if isinstance(target, FusedLinear) else FusedLinear(target)
            for part, rows in self._resolution.parts[current_key].items():
                before = fused.slice(part) or RowSlice(fused.get_base_layer(), rows)
                layer = self._adapted(config, adapter_name, before, f"{current_key}.{part}")
                if layer is not before:
                    fused.add_module(part, layer)
        else:
            # PEFT found this layer by a state dict and not by the configuration
            if current_key not in self._resolution.ranks:
                self._resolution.decide({current_key: target})
            adapted = self._adapted(config, adapter_name, target, current_key)
        if adapted is not target:
            self._replace_module(parent, target_name, adapted, target)

    def _inject_parameters(
        self, peft_config: PeftConfig, model: nn.Module, adapter_name: str, low_cpu_mem_usage: bool
    ) -> list[str]:
        """Adapt the experts, each with its own rank. PEFT's own way has one rank for all of a
        parameter."""
        for name, found in self._resolution.experts.items():
            place, _, key = name.rpartition(".")
            module = model.get_submodule(place)  # the second parameter of a module finds it adapted
            fused = module if isinstance(module, FusedExperts) else FusedExperts(module)
            with init_empty_weights() if low_cpu_mem_usage else nullcontext():
                layers = [
                    self._adapted(ours(peft_config), adapter_name, layer, f"{name}.{index}")
                    for index, layer in enumerate(found)
                ]
            fused.add_module(key, nn.ModuleList(layers))
            if fused is not module:
                parent, _, own = place.rpartition(".")
                self._replace_module(model.get_submodule(parent), own, fused, module)
        return list(self._resolution.experts)

    def _adapted(self, config: SvdConfig, adapter_name: str, target: nn.Module, name: str) -> SvdLayer[Any]:
        """The layer `target` with one more adapter. Without an adapter it gets a new layer around
        it."""
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
        shapes = self._resolution.shapes
        layer.update_layer(adapter_name, self._resolution.ranks[name], config, factors, load_only, shapes)
        if weightless:
            layer.filled_elsewhere(adapter_name)
        if config.compact and factors is not None:
            layer.recomputable.add(adapter_name)
        if layer is not target and adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        return layer

    def _check_merge_allowed(self) -> None:
        """PEFT warns here of tied weights. Svdtune's merge leaves the other modules' weight alone,
        so there is no warning."""

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """Replace a module in every place where it stands. PEFT's own knows one place. On unloading
        it also writes to `weight`, which HQQ's layers and a head of several layers lack."""
        setattr(parent, child_name, new_module)
        for other_parent, name in self._places.get(child, ()):
            setattr(other_parent, name, new_module)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Make trained factors fp32 whatever the base's dtype. `autocast_adapter_dtype=False` gives
        them the base's.

        Frozen factors stay as they are: rounded, they would belong to another weight.
        """
        if autocast_adapter_dtype:
            super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        for layer in self.adapted_layers():
            if not autocast_adapter_dtype:
                _cast_to_base_dtype(layer, adapter_name)
            layer.keep_values()

    def add_weighted_adapter(self, *_: Any, **__: Any) -> None:
        """Refused: a weighted sum of adapters is in general no adapter of these methods.

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
        """The context that PEFT puts around a forward pass or `generate`. It may name an adapter
        for each sample.

        Raises:
            SvdtuneError: names that are no adapters', a model in training, or merged adapters.
        """
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        self._check_samples(names)
        beams = kwargs.get("num_beams") or 1
        samples, expanded = Samples(names), Samples([name for name in names for _ in range(beams)])
        encoder: Any = self.model.get_encoder() if hasattr(self.model, "get_encoder") else None
        # which sees each sample once; of a model without one, transformers gives the model itself
        inside = set() if encoder in (None, self.model) else set(encoder.modules())
        hooks = []
        try:
            for module in self.model.modules():
                if isinstance(module, SvdLayer | FusedLinear | AuxiliaryTrainingWrapper):
                    own = samples if module in inside else expanded
                    if isinstance(module, AuxiliaryTrainingWrapper):  # an adapter may train none of it
                        own = Samples([name if name in module._adapters else BASE for name in own])
                    handed = partial(_hand_over, own)
                    hooks.append(module.register_forward_pre_hook(handed, with_kwargs=True))
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _check_samples(self, names: Any) -> None:
        if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
            raise SvdtuneError(
                f"`adapter_names` must be a list of an adapter's name for each sample of the batch; got {names!r:.60}"
            )
        if unknown := [name for name in names if name != BASE and name not in self.peft_config]:
            first = list(self.peft_config)[:_NAMED]
            more = f" and {left} more" if (left := len(self.peft_config) - len(first)) else ""
            raise SvdtuneError(
                f"`adapter_names` has {unknown[0]!r}, which is none of the model's adapters: {', '.join(first)}{more} (or "
                f"{BASE!r} for none). Load it with load_adapter first"
            )
        if self.training:
            raise SvdtuneError(
                "`adapter_names` is for inference, and the model is in training mode: call model.eval() first, or train each "
                "adapter by itself, with set_adapter before"
            )
        asked = set(names)
        for name, module in self.model.named_modules():
            if isinstance(module, AuxiliaryTrainingWrapper) and not (
                module.disable_adapters or isinstance(module.original_module, BY_SAMPLE)
            ):
                kind = type(module.original_module).__name__
                raise SvdtuneError(
                    f"`adapter_names` cannot be heeded by {name!r} of `modules_to_save`: PEFT gives samples their own linear "
                    f"layers, embeddings and convolutions alone, and it is a {kind}. Call the model once for each adapter, "
                    "with set_adapter before"
                )
            of_expert = isinstance(module, SvdLayer) and re.search(r"expert\w*\.\d+\.", name)
            if of_expert or isinstance(module, FusedExperts):
                raise SvdtuneError(
                    f"`adapter_names` cannot be heeded by {name!r}: experts are given tokens, of any sample. Call the model "
                    "once for each adapter, with set_adapter before"
                )
            if isinstance(module, SvdLayer):
                module.check_samples(asked)


def _hand_over(
    samples: Samples, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, kwargs | {"adapter_names": samples}


def _compiled_in_place(model: nn.Module) -> nn.Module:
    """The module inside the result of `torch.compile`, compiled in the same way. So its layers keep
    the model's names."""
    while isinstance(model, OptimizedModule):
        inside: nn.Module = model._orig_mod
        inside._compiled_call_impl = model.dynamo_ctx(inside._call_impl)
        model = inside
    return model


def _cast_to_base_dtype(layer: SvdLayer[Any], adapter: str) -> None:
    dtype = device_and_dtype(layer.get_base_layer())[1]
    for name in layer.trained:
        tensors = getattr(layer, name)
        if adapter in tensors and dtype.is_floating_point:
            before = tensors[adapter]
            tensors[adapter] = nn.Parameter(before.detach().to(dtype), requires_grad=before.requires_grad)
