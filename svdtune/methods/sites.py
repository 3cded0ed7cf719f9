"""Sites: where an adapter goes on a model, with the rank and the numbers that it has there.

This is the one answer, for every PEFT configuration. PEFT itself puts the adapter on a copy of the
model without weights, and everything is read off that copy: names, slices of fused weights, ranks,
parameters. So what is planned, counted or started from disk is what training will have.
"""

import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, overload

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from svdtune import spectra
from svdtune.checkpoint import Checkpoint
from svdtune.errors import SvdtuneError
from svdtune.methods.config import SvdConfig
from svdtune.methods.experts import expert_at
from svdtune.methods.files.integrity import PEFT_ROOT
from svdtune.methods.injection import inject, method_name
from svdtune.methods.layers.experts import ExpertSlice
from svdtune.methods.layers.rows import Rows
from svdtune.methods.layers.slices import Fused, RowSlice
from svdtune.methods.ranks import pattern_rank, with_rank, with_ranks

Model = nn.Module | Checkpoint


@dataclass(frozen=True)
class Site:
    """One adapted layer.

    Attributes:
        name: of the layer in the base model; a slice of a fused weight is called
            `<module>.<slice>`, one of fused experts `<parameter>.<expert>`.
        module: the base model's module that holds its weight; of fused experts the parameter.
        rows: which rows of that weight's matrix; None for all of them.
        shape: (out, in) of the layer's matrix; None where the module has no single matrix.
        rank: None for a method without ranks.
        trained: numbers that get gradients there, a trained bias among them.
        frozen: numbers that the adapter adds there without training them.
        expert: whether its matrix is one of fused experts'.
    """

    name: str
    module: str
    rows: Rows | None
    shape: tuple[int, int] | None
    rank: int | None
    trained: int
    frozen: int
    expert: bool = False

    def weight(self, model: Model) -> Tensor:
        """The layer's matrix [out, in] in a checkpoint or a loaded model, read now.

        Raises:
            SvdtuneError: it is not there.
        """
        if isinstance(model, Checkpoint):
            if self.expert:
                place = expert_at(model.model, self.name)
                return place.stack.matrix(model.expert(self.module, place.index))
            whole = model.weight(self.module)
        elif self.expert:
            return spectra.base_weight(expert_at(model, self.name))
        else:
            whole = spectra.base_weight(model.get_submodule(self.module))
        return whole if self.rows is None else self.rows.matrix(whole)


class Count(NamedTuple):
    """Parameters of an adapted model.

    Attributes:
        trained: those that get gradients.
        frozen: those that the adapter adds without training them.
        total: all of them, the base model's included.
    """

    trained: int
    frozen: int
    total: int


@dataclass(frozen=True)
class Sites(Sequence[Site]):
    """The sites of an adapter, in the model's order.

    Attributes:
        config: the adapter's configuration as PEFT completed it; None for a model without an
            adapter.
        places: the sites.
        count: the parameters of the whole model. Virtual tokens, `modules_to_save` and biases that
            are trained elsewhere belong to no site, and count here.
    """

    config: PeftConfig | None
    places: tuple[Site, ...]
    count: Count  # type: ignore[assignment]  # not Sequence's method: no two sites are equal

    @overload
    def __getitem__(self, index: int) -> Site: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[Site, ...]: ...

    def __getitem__(self, index: int | slice) -> Site | tuple[Site, ...]:
        return self.places[index]

    def __len__(self) -> int:
        return len(self.places)

    @property
    def ranks(self) -> dict[str, int]:
        """Rank by site, of those that have one."""
        return {site.name: site.rank for site in self.places if site.rank is not None}


def sites(
    model: Model, config: PeftConfig | None = None, *, device: str | None = None, progress: bool | None = None
) -> Sites:
    """Where an adapter goes on a model, with ranks and numbers.

    Args:
        model: a checkpoint, or a model with weights or without; it stays as it is.
        config: of any PEFT method. With a threshold, weights are read for the ranks, one at a time.
            None describes the adapter that is on the model already, or the bare model.
        device: where weights on the CPU are decomposed; a GPU by default, where there is one.
        progress: show a bar; by default where stderr is a terminal.

    Raises:
        SvdtuneError: the adapter cannot be put on this model, or it needs weights that are not
            there.
    """
    if config is None:
        return _read(model.model if isinstance(model, Checkpoint) else model)
    if isinstance(config, SvdConfig) and config.threshold is not None and not config.initialized:
        config = at_threshold(model, config, config.threshold, device=device, progress=progress)
    return _read(skeleton(model, config))


def count(model: Model, config: PeftConfig | None = None) -> Count:
    """The parameters of an adapted model; arguments and errors as in `sites`."""
    return sites(model, config).count


def at_threshold(
    model: Model, config: PeftConfig, threshold: float, *, device: str | None = None, progress: bool | None = None
) -> PeftConfig:
    """The configuration with every rank in `rank_pattern`, in place of a threshold.

    A rank that the configuration's own `rank_pattern` gives stays. Elsewhere the rank is the least
    k whose k largest singular values sum to the share `threshold` of all of them (SARA, Algorithm
    1).

    Args:
        model: with weights.
        config: of a method whose layers each have a rank.
        threshold: in (0, 1].
        device, progress: as in `sites`.

    Raises:
        SvdtuneError: as `sites`.
    """
    found = _read(skeleton(model, with_rank(config, 1)))
    open_ = [site for site in found if pattern_rank(config, site.name, site.module) is None]
    weights = readers(model, open_)
    return with_ranks(config, found.ranks | spectra.ranks(weights, threshold, device=device, progress=progress))


def readers(model: Model, places: Sequence[Site]) -> spectra.Weights:
    """By site, a function that reads its matrix [out, in].

    Raises:
        SvdtuneError: the checkpoint is a shape without weights.
    """
    if places and isinstance(model, Checkpoint) and not model.readers:
        raise SvdtuneError(
            f"{model.name} is a shape without weights, and a threshold, a budget or match_lora take them; give r instead"
        )
    return {site.name: partial(site.weight, model) for site in places}


def skeleton(model: Model, config: PeftConfig) -> PeftModel:
    """The adapter on a copy of the model without weights: every parameter is on the meta device.

    Args:
        model: stays as it is.
        config: with ranks and no threshold; it stays as it is.

    Raises:
        SvdtuneError: the adapter cannot be put on this model, or not without weights.
    """
    bare = model.model if isinstance(model, Checkpoint) else model
    if any(isinstance(module, BaseTunerLayer) for module in bare.modules()):
        raise SvdtuneError(
            "the model has an adapter on it already; give the base model (`model.unload()`), or leave the "
            "configuration out"
        )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            adapted = inject(_without_weights(bare), copy.deepcopy(config), low_cpu_mem_usage=True)
        except NotImplementedError as error:
            raise SvdtuneError(
                f"what {method_name(config)} trains cannot be counted without the model's weights; put it on the loaded "
                "model with get_peft_model, and count there"
            ) from error
        except TypeError as error:
            raise SvdtuneError(f"the method {method_name(config)} cannot be put on this model: {error}") from error
    for warning in caught:  # the others are about starting values, which no tensor takes here
        if str(warning.message).startswith("The following rank_pattern keys did not match"):
            warnings.warn(warning.message, stacklevel=2)
    _tie_again(adapted)
    return adapted


def _without_weights(model: nn.Module) -> nn.Module:
    """A copy of a model whose parameters and buffers are on the meta device."""
    memo: dict[int, Any] = {id(tensor): _on_meta(tensor) for tensor in (*model.parameters(), *model.buffers())}
    hooks = (module._hf_hook for module in model.modules() if hasattr(module, "_hf_hook"))
    memo |= {id(hook): hook for hook in hooks}  # Accelerate's hooks hold weights that are offloaded
    return copy.deepcopy(model, memo)


def _on_meta(tensor: Tensor) -> Tensor:
    empty = torch.empty_like(tensor, device="meta")
    if not isinstance(tensor, nn.Parameter):
        return empty
    parameter = torch.Tensor._make_subclass(type(tensor), empty.detach(), tensor.requires_grad)
    vars(parameter).update(vars(tensor))  # bitsandbytes says there how the numbers are stored
    vars(parameter).pop("_is_hf_initialized", None)  # PEFT would take it for an argument of the class
    return parameter


def _tie_again(model: nn.Module) -> None:
    """Make parameters of one storage one again. PEFT makes a new one of each that a module is given
    on the meta device, so tied weights and replicated layers would count several times."""
    first: dict[tuple[int, torch.Size], nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                storage = parameter.untyped_storage()._cdata
                module._parameters[name] = first.setdefault((storage, parameter.shape), parameter)


def _read(model: nn.Module) -> Sites:
    """The sites and numbers of an adapted model."""
    layers = dict(_layers(model))
    trained, frozen = dict.fromkeys(layers, 0), dict.fromkeys(layers, 0)
    base = {id(parameter) for layer in layers.values() for parameter in layer.get_base_layer().parameters()}
    all_trained = total = 0
    for name, parameter in model.named_parameters():
        numbers = _numbers(parameter)
        total += numbers
        owner = _owner(name, layers)
        # On the meta device PEFT forgets to freeze AdaLoRA's own count of ranks.
        if parameter.requires_grad and ".ranknum." not in name:
            all_trained += numbers
            if owner is not None:
                trained[owner] += numbers
        elif owner is not None and id(parameter) not in base:
            frozen[owner] += numbers
    places = tuple(_site(name, layer, trained[name], frozen[name]) for name, layer in layers.items())
    config = next(iter(getattr(model, "peft_config", {}).values()), None)
    return Sites(config, places, Count(all_trained, sum(frozen.values()), total))


def _layers(model: nn.Module) -> Iterator[tuple[str, BaseTunerLayer]]:
    """The adapted layers by their names in `model`. A fused projection counts with its slices."""
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and not isinstance(module, Fused):
            yield name, module


def _owner(name: str, layers: Mapping[str, BaseTunerLayer]) -> str | None:
    """The innermost adapted layer around a parameter."""
    while name and name not in layers:
        name = name.rpartition(".")[0]
    return name or None


def _site(name: str, layer: BaseTunerLayer, trained: int, frozen: int) -> Site:
    name = name.removeprefix(PEFT_ROOT)
    base = layer.get_base_layer()
    module, rows = (name.rpartition(".")[0], base.rows) if isinstance(base, RowSlice) else (name, None)
    ranks = getattr(layer, "r", None)
    if isinstance(ranks, Mapping):
        ranks = next((ranks[adapter] for adapter in layer.active_adapters if adapter in ranks), None)
    rank = ranks if isinstance(ranks, int) else None
    return Site(name, module, rows, _shape(base), rank, trained, frozen, isinstance(base, ExpertSlice))


def _shape(base: nn.Module) -> tuple[int, int] | None:
    try:
        return spectra.matrix_shape(base)
    except AttributeError:  # an embedding, or a module of several weights
        shape: tuple[int, ...] = getattr(getattr(base, "weight", None), "shape", ())
        return (shape[0], shape[1]) if len(shape) == 2 else None


def _numbers(parameter: nn.Parameter) -> int:
    """How many numbers a parameter has, as PEFT counts: a parameter that ZeRO-3 partitioned as a
    whole, and one of 4 bits with all its numbers."""
    numbers = getattr(parameter, "ds_numel", None) or parameter.numel()
    if type(parameter).__name__ == "Params4bit":
        numbers *= 2 * parameter.element_size()
    return numbers
