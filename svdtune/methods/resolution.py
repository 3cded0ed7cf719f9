"""What is decided about the layers of a model before the first is adapted: names, ranks, factors,
fingerprints.

All layers are decided together. So a layer that cannot be adapted leaves the model as it was, and
the disk cache and the progress bar see the whole job.
"""

import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.prune import BasePruningMethod
from transformers.pytorch_utils import Conv1D

from svdtune import spectra
from svdtune.errors import SvdtuneError, SvdtuneWarning
from svdtune.linalg import Factors
from svdtune.methods.config import SvdConfig
from svdtune.methods.files.card import TITLES
from svdtune.methods.layers.base import Shapes, SvdLayer
from svdtune.methods.layers.convolution import kernel_of
from svdtune.methods.layers.experts import ExpertSlice, ExpertStack, layers_of
from svdtune.methods.layers.rows import Parts, Rows, check_rows, chosen_parts
from svdtune.methods.layers.slices import FusedLinear, RowSlice
from svdtune.methods.ranks import given_rank
from svdtune.methods.start.memory import Work, check_agreement
from svdtune.names import is_named
from svdtune.spectra import sharing

_MAMBA, _MAMBA_2 = {"conv1d", "x_proj", "dt_proj", "out_proj"}, {"conv1d", "out_proj"}
# Layers whose weights the module around them hands to a kernel, by that module's class.
_READ = {
    "MambaMixer": _MAMBA,
    "FalconMambaMixer": _MAMBA,
    "JambaMambaMixer": {"conv1d", "dt_proj"},
    "Mamba2Mixer": _MAMBA_2,
    "BambaMixer": _MAMBA_2,
    "FalconH1Mixer": _MAMBA_2,
    "NemotronHMamba2Mixer": _MAMBA_2,
    "GraniteMoeHybridMambaLayer": _MAMBA_2,
    "Zamba2MambaMixer": _MAMBA_2,
}


class Resolution:
    """The decisions for one adapter.

    Attributes:
        config: the adapter's configuration.
        model: that it goes on.
        layer_cls: the method's layer.
        load_only: whether values come from a file, so that no weight is decomposed.
        shared: ids of the parameters that several modules hold.
        present: whether this process has the model's weights.
        ranks: by layer.
        fingerprints: of the base weights, by layer, where they have one.
        factors: by layer, where the adapter starts from them.
        parts: the slices to adapt, by fused module, or by parameter of fused experts.
        experts: their layers by parameter, or the matrices that layers are to stand around.
        kernels: by convolution.
        shapes: of the adapter's tensors, by layers of one size.
    """

    def __init__(self, config: SvdConfig, model: nn.Module, layer_cls: type[SvdLayer[Any]], load_only: bool):
        self.config, self.model, self.layer_cls, self.load_only = config, model, layer_cls, load_only
        self.shared = shared_weights(model)
        self.present = sharing.has_weights(model)
        self.ranks: dict[str, int] = {}
        self.fingerprints: dict[str, str] = {}
        self.factors: dict[str, Factors] = {}
        self.parts: dict[str, Parts] = {}
        self.experts: dict[str, list[nn.Module]] = {}
        self.kernels: dict[str, dict[str, Any]] = {}
        self.shapes: Shapes = {}

    def layers(self, targets: Mapping[str, nn.Module]) -> Iterator[tuple[str, nn.Module]]:
        """The layers to adapt, by name: the target modules, or their slices."""
        config = self.config
        if isinstance(config.fused_slices, dict) and not config.initialized and targets:
            for key in config.fused_slices:
                if not any(is_named(name, key) for name in targets):
                    raise SvdtuneError(
                        f"`fused_slices` names {key!r}, but no target module is called that; the targets are "
                        f"{', '.join(sorted({name.rpartition('.')[2] for name in targets}))}"
                    )
        for name, module in targets.items():
            parts = self._parts_of(name, module)
            if not parts:
                yield name, module
                continue
            self.parts[name] = parts
            fused = module if isinstance(module, FusedLinear) else None
            for part, rows in parts.items():
                adapted = fused.slice(part) if fused else None
                yield f"{name}.{part}", adapted or RowSlice(fused.get_base_layer() if fused else module, rows)

    def experts_of(self, stacks: Mapping[str, ExpertStack]) -> Iterator[tuple[str, nn.Module]]:
        """The experts' layers to adapt, by the names of their parameters, which `asked_stacks`
        gives."""
        for name, stack in stacks.items():
            self.experts[name] = layers_of(self.model, name, stack)
            self.parts[name] = {str(one.index): one.rows for one in stack.slices()}
            yield from ((f"{name}.{index}", layer) for index, layer in enumerate(self.experts[name]))

    def _parts_of(self, name: str, module: nn.Module) -> Parts:
        config = self.config
        check_supported(name, module)
        if config.initialized:
            stored = {key: rows for key, rows in config.slices.items() if key.rpartition(".")[0] == name}
            parts = {key.rpartition(".")[2]: Rows(*rows) for key, rows in stored.items()}
            check_rows(name, parts, spectra.matrix_shape(module)[0])
        else:
            out = spectra.matrix_shape(module)[0]
            parts = chosen_parts(config.fused_slices, config.paper_slices, self.model, name, out)
        if isinstance(module, BaseTunerLayer) and bool(parts) != isinstance(module, FusedLinear):
            raise SvdtuneError(
                f"{name!r} has an adapter already that adapts it {'as a whole' if parts else 'by slices'}, so another one "
                f"cannot adapt it {'by slices' if parts else 'as a whole'}. Give both the same `fused_slices`"
            )
        return parts

    def decide(self, targets: Mapping[str, nn.Module]) -> None:
        """Decide everything about these layers. Raise `SvdtuneError` for the first that cannot be
        adapted."""
        config = self.config
        for name, module in targets.items():
            check_supported(name, module)
            check_one_method(name, module, self.layer_cls)
            config.check_layer(name, module)
            base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
            if isinstance(base, spectra.CONVOLUTIONS):
                self.kernels[name] = kernel_of(base)
        if not self.load_only:
            check_agreement(config, targets, self.present)
        asked = {name: self._given_rank(name) for name in targets}
        given = {name: rank for name, rank in asked.items() if rank is not None}
        measured = [name for name in targets if name not in given]
        threshold = cast(float, config.threshold)  # where it is None, every rank is given
        if measured:
            self._check_readable(measured)
        work = Work(targets, together=not self.load_only, present=self.present)
        takes_factors = config.needs_factors and not self.load_only
        # Of these one decomposition gives rank and factors.
        at_once = measured if takes_factors and config.triplets == "first" and not config.compact else []
        if at_once:
            ranks, factors = work.ranked_factors(at_once, threshold)
            given |= ranks
            self.factors |= factors
        elif measured:
            given |= work.ranks(measured, threshold)
        given = {name: given[name] for name in targets}
        for name, rank in given.items():
            check_rank(name, rank, targets[name])
        self.ranks |= given
        if not config.initialized:
            self.fingerprints |= work.fingerprints()
        if takes_factors:
            # not by what this process has: those without weights are given none, and work along
            rest = {name: rank for name, rank in given.items() if name not in at_once}
            self.factors |= work.factors(rest, config.triplets, exact=config.compact)

    def _given_rank(self, name: str) -> int | None:
        """The rank that the configuration gives one layer; None if its spectrum decides."""
        if self.config.initialized and name in self.config.ranks:
            return self.config.ranks[name]
        module = name.rpartition(".")[0]
        return given_rank(self.config, name, *([module] if module in self.parts else []))

    def check_patterns(self) -> None:
        """Warn of keys in `rank_pattern` that are no layer's."""
        layers = {*self.ranks, *self.parts}
        unused = [
            key for key in self.config.rank_pattern if not any(re.match(rf"(.*\.)?({key})$", name) for name in layers)
        ]
        if unused:
            warnings.warn(
                f"The following rank_pattern keys did not match any targeted module and were ignored: {sorted(unused)}.",
                SvdtuneWarning,
                stacklevel=2,
            )

    def _check_readable(self, names: list[str]) -> None:
        if self.config.initialized:
            raise SvdtuneError(
                f"the saved adapter has no rank for {names[0]!r} ({len(names)} layers in all): it was made for another "
                "model, or its adapter_config.json was altered. Load it onto the model it was trained on"
            )
        if self.load_only:
            raise SvdtuneError(
                f"threshold={self.config.threshold} takes the rank of {names[0]!r} from its weight, but low_cpu_mem_usage=True "
                "reads no weights. Give the ranks with `r` or `rank_pattern` (`svdtune plan` writes one), or leave "
                "low_cpu_mem_usage out"
            )

    def record(self) -> None:
        """Write what was decided into the configuration. Loading and export read it there."""
        config = self.config
        config.ranks = {name: self.ranks[name] for name in sorted(self.ranks)}
        config.kernels = {name: self.kernels[name] for name in sorted(self.kernels)}
        config.slices = {
            f"{name}.{part}": rows.as_list() for name in sorted(self.parts) for part, rows in self.parts[name].items()
        }
        if not config.initialized:
            config.base_fingerprint = {name: self.fingerprints[name] for name in sorted(self.fingerprints)}


def check_supported(name: str, module: nn.Module) -> None:
    """Raise `SvdtuneError` unless the layer is nn.Linear or a subclass, Conv1D, a convolution, or
    quantized."""
    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    if not (isinstance(base, (nn.Linear, Conv1D, RowSlice, *spectra.CONVOLUTIONS)) or hasattr(base, "W_q")):
        raise SvdtuneError(
            f"target module {name!r} is a {type(base).__name__}; SARA, Mo-SARA and SORSA adapt torch.nn.Linear, transformers' "
            "Conv1D, and torch.nn.Conv1d, Conv2d and Conv3d. Narrow `target_modules`, or name it in `exclude_modules`"
        )
    if type(base) is NonDynamicallyQuantizableLinear:
        raise SvdtuneError(
            f"target module {name!r} is the output projection of a torch.nn.MultiheadAttention, which reads its weight "
            "but never calls it, so an adapter there would do nothing. Name it in `exclude_modules`"
        )
    if base.__class__.__name__.startswith("FP8") or _is_float8(base):
        raise SvdtuneError(
            f"the weight of {name!r} is stored in float8 with scales beside it ({type(base).__name__}), and its codes are no "
            "matrix to decompose. Load the model dequantized (for Transformers, FineGrainedFP8Config(dequantize=True)), or "
            "take its checkpoint in bf16"
        )
    if (hook := _recomputing_hook(base)) is not None:
        raise SvdtuneError(
            f"the weight of {name!r} is computed by a hook ({hook}) before every call, so what is merged into it would be "
            "lost. Take the hook off first (torch.nn.utils.remove_weight_norm, remove_spectral_norm or prune.remove), or name "
            "the layer in `exclude_modules`"
        )
    if is_parametrized(base, "weight"):
        raise SvdtuneError(
            f"the weight of {name!r} is computed by a parametrization (such as weight_norm) at every use, so there is none to "
            "decompose or to merge into. Take it off with torch.nn.utils.parametrize.remove_parametrizations, or name the "
            "layer in `exclude_modules`"
        )


def check_called(model: nn.Module, targets: Iterable[str]) -> None:
    """Raise `SvdtuneError` for a layer that is never called: the module around it only reads its
    weight, or compiling renamed it."""
    for name in targets:
        if "_orig_mod" in name.split("."):
            raise SvdtuneError(
                f"target module {name!r} lies in a block that is compiled already, which changes its name: the adapter would "
                "fit no other model. Put the adapter on first, then compile the blocks"
            )
        parent, _, own = name.rpartition(".")
        kind = type(model.get_submodule(parent)).__name__
        if own in _READ.get(kind, ()):
            raise SvdtuneError(
                f"target module {name!r} is read by the kernels of {kind} and not called, so an adapter there would do nothing "
                f"or be lost. Name {own!r} in `exclude_modules`, or leave it out of `target_modules`"
            )


def _is_float8(base: nn.Module) -> bool:
    weight = getattr(base, "weight", None)
    return isinstance(weight, Tensor) and weight.is_floating_point() and weight.element_size() == 1


def _recomputing_hook(base: nn.Module) -> str | None:
    """The kind of a hook that computes the weight anew; None if there is none."""
    for hook in base._forward_pre_hooks.values():
        kind = type(hook)
        known = kind.__module__.startswith(("torch.nn.utils.weight_norm", "torch.nn.utils.spectral_norm"))
        if known or isinstance(hook, BasePruningMethod):
            return kind.__name__
    return None


def check_one_method(name: str, module: nn.Module, method: type[SvdLayer[Any]]) -> None:
    """Raise `SvdtuneError` for a layer that has an adapter of another of svdtune's methods."""
    other = next((m for m in module.modules() if isinstance(m, SvdLayer) and not isinstance(m, method)), None)
    if other is not None:
        titles = TITLES[other.method], TITLES[method.method]
        raise SvdtuneError(
            f"layer {name!r} has a {titles[0]} adapter, and a {titles[1]} adapter cannot stand on the same layer. Adapt other "
            "layers, or unload the first. Exported to LoRA (`svdtune export ADAPTER --to lora --output FOLDER`) each gives the "
            "same outputs, and PEFT keeps several LoRAs on one model"
        )


def check_rank(name: str, rank: int, module: nn.Module) -> None:
    """Raise `SvdtuneError` if the rank is larger than the layer's matrix allows."""
    shape = spectra.matrix_shape(module)
    if rank > min(shape):
        base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        of_expert = isinstance(base, ExpertSlice)
        way = "leave its parameter out of `target_parameters`" if of_expert else "name the layer in `exclude_modules`"
        raise SvdtuneError(
            f"r = {rank} is larger than layer {name!r} {list(shape)} allows; its rank is at most {min(shape)}. Lower `r`, "
            f"set rank_pattern={{{re.escape(name)!r}: {min(shape)}}}, or {way}"
        )


def shared_weights(model: nn.Module) -> set[int]:
    """The ids of the parameters that several modules hold."""
    seen: set[int] = set()
    shared: set[int] = set()
    for module in model.modules():
        ids = {id(parameter) for parameter in module._parameters.values() if parameter is not None}
        shared |= seen & ids
        seen |= ids
    return shared


def shared_places(model: nn.Module) -> dict[nn.Module, list[tuple[nn.Module, str]]]:
    """The places, (parent, name), of each module that stands in several."""
    places: dict[nn.Module, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child is not None:
                places.setdefault(child, []).append((parent, name))
    return {child: found for child, found in places.items() if len(found) > 1}
