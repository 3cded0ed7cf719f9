"""What a method trains on a model, counted on the meta device: PEFT's own adapter, put on an architecture without weights."""

import copy
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from svdtune.checkpoint import Checkpoint, open_checkpoint
from svdtune.errors import SvdtuneError
from svdtune.methods.layers.rows import Rows
from svdtune.methods.layers.slices import FusedLinear, RowSlice
from svdtune.models.loading import locate
from svdtune.spectra import matrix_shape
from svdtune.training.method import adapt


@dataclass(frozen=True)
class Layer:
    """One adapted matrix.

    Attributes:
        out_features, in_features: its shape.
        fixed: parameters trained there whatever the rank.
        per_rank: what each rank adds; 0 where the method's settings fix the rank of this layer.
        weight: reads the matrix [out, in].
    """

    out_features: int
    in_features: int
    fixed: int
    per_rank: int
    weight: Callable[[], Tensor]


@lru_cache(maxsize=4)
def opened(model: str) -> Checkpoint:
    """The model as `svdtune.planning` opens it, once."""
    return open_checkpoint(locate(model))


def count(checkpoint: Checkpoint, method: Mapping[str, Any]) -> int:
    """Parameters that a method section trains on a model.

    Args:
        checkpoint: the model.
        method: the section: `name` and settings. Of SARA, Mo-SARA and SORSA, with ranks and no threshold.

    Raises:
        SvdtuneError: unknown or wrong settings, or a method that PEFT cannot set up without weights.
    """
    return trained_parameters(adapted(checkpoint, method))


def trained_parameters(model: nn.Module) -> int:
    """Parameters of a model that get gradients."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def adapted(checkpoint: Checkpoint, method: Mapping[str, Any]) -> PreTrainedModel | PeftModel:
    """A copy of the model on the meta device, adapted as a run would adapt it, except that nothing is decomposed."""
    name = method["name"]
    options = {key: value for key, value in method.items() if key != "name"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of starting values that a meta tensor cannot take
        try:
            model = adapt(copy.deepcopy(checkpoint.model), name, options, low_cpu_mem_usage=True)
        except SvdtuneError:
            raise
        except NotImplementedError as error:
            raise SvdtuneError(
                f"what {name} trains cannot be counted without the model's weights; leave it out of the budget"
            ) from error
        except (ValueError, TypeError) as error:
            raise SvdtuneError(f"the method {name} cannot be put on this model: {error}") from error
    for parameter_name, parameter in model.named_parameters():
        # AdaLoRA's own count of ranks, which PEFT forgets to freeze on the meta device.
        if ".ranknum." in parameter_name:
            parameter.requires_grad_(False)
    return model


def largest_rank(checkpoint: Checkpoint, method: Mapping[str, Any]) -> int:
    """The largest rank that any of the matrices which a method adapts can have."""
    shapes = (matrix_shape(module.get_base_layer()) for module in _tuned(adapted(checkpoint, method)).values())
    return max(map(min, shapes), default=1)


def layers(checkpoint: Checkpoint, method: Mapping[str, Any]) -> dict[str, Layer]:
    """The adapted matrices by name, in the model's order, with what they cost.

    Costs are measured at ranks 1 and 2, since they are affine in the rank for every method that has ranks by layer.

    Args:
        checkpoint: the model.
        method: a section of a method with `r`; its own `r` and `threshold` do not matter, its `rank_pattern` does.
    """
    settings = {key: value for key, value in method.items() if key not in ("r", "threshold")}
    one, two = (_tuned(adapted(checkpoint, settings | {"r": rank})) for rank in (1, 2))
    found = {}
    for name, module in one.items():
        least, more = trained_parameters(module), trained_parameters(two[name])
        owner, rows = _place(module, name)
        out, inside = matrix_shape(checkpoint.model.get_submodule(owner))
        weight = partial(_read, checkpoint, owner, rows)
        found[name] = Layer(rows.count if rows else out, inside, 2 * least - more, more - least, weight)
    return found


def _tuned(model: nn.Module) -> dict[str, BaseTunerLayer]:
    """The adapted layers by their names in the base model; of a fused projection, its slices."""
    modules = {name.removeprefix("base_model.model."): module for name, module in model.named_modules()}
    return {
        name: module
        for name, module in modules.items()
        if isinstance(module, BaseTunerLayer) and not isinstance(module, FusedLinear)
    }


def _place(module: BaseTunerLayer, name: str) -> tuple[str, Rows | None]:
    """The module of the base model that holds a layer's matrix, and which of its rows; None for all of them."""
    base = module.get_base_layer()
    return (name.rpartition(".")[0], base.rows) if isinstance(base, RowSlice) else (name, None)


def _read(checkpoint: Checkpoint, module: str, rows: Rows | None) -> Tensor:
    whole = checkpoint.weight(module)
    return whole if rows is None else rows.matrix(whole)
