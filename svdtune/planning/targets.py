"""Which modules an adapter would go on, decided by PEFT's own rules on a model without weights, and which slices of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from peft import LoraConfig
from peft.tuners.tuners_utils import _ExcludedModule, _maybe_include_all_linear_layers, check_target_module_exists
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from transformers import PreTrainedModel

from svdtune.errors import SvdtuneError
from svdtune.methods import MoSaraConfig, SaraConfig, SorsaConfig
from svdtune.methods.layers.rows import Rows, chosen_parts
from svdtune.methods.sites import check_supported
from svdtune.spectra import matrix_shape

CONFIGS = {config.method: config for config in (SaraConfig, MoSaraConfig, SorsaConfig)}


@dataclass(frozen=True)
class Target:
    """What one adapted layer is: a module's whole matrix, or some rows of it.

    Attributes:
        module: name of the module.
        rows: of its matrix; None for all of them.
        in_features, out_features: of the layer's matrix.
    """

    module: str
    rows: Rows | None
    in_features: int
    out_features: int


def resolve_targets(
    model: PreTrainedModel,
    target_modules: Sequence[str] | str | None = None,
    exclude_modules: Sequence[str] | str | None = None,
) -> tuple[list[str], list[str] | str]:
    """(names of the modules to adapt in the model's order, `target_modules` as a configuration should state it).

    Args:
        model: on the meta device or not.
        target_modules: names, a regular expression or "all-linear", as in LoRA; None is PEFT's default for the architecture.
        exclude_modules: names or a regular expression of modules to leave out.

    Raises:
        SvdtuneError: no default is known, nothing matches, or a match is no linear layer.
    """
    stated = target_modules
    if target_modules is None:
        known = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(model.config.model_type)
        if known is None:
            raise SvdtuneError(
                f"PEFT knows no default target_modules for {model.config.model_type!r}; name them, or use 'all-linear'"
            )
        target_modules = stated = sorted(known)
    stated = stated if isinstance(stated, str) else list(stated)
    exclude = list(exclude_modules) if exclude_modules and not isinstance(exclude_modules, str) else exclude_modules
    config = LoraConfig(target_modules=stated, exclude_modules=exclude or None)
    config = _maybe_include_all_linear_layers(config, model)
    names = []
    for name, module in model.named_modules():
        matched = check_target_module_exists(config, name) if name else False
        if matched and not isinstance(matched, _ExcludedModule):
            check_supported(name, module)
            names.append(name)
    if not names:
        some = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name, _ in model.named_modules() if name))
        raise SvdtuneError(f"target_modules={target_modules!r} matches no module of this model; it has {some}")
    return names, stated


def layers_of(
    model: PreTrainedModel, names: Sequence[str], method: str, fused_slices: Mapping[str, Sequence[str]] | str | None
) -> dict[str, Target]:
    """The layers that an adapter of a method has on these modules, by name; slices of fused ones as `fused_slices` asks.

    Raises:
        SvdtuneError: slices that are not there, or for a method that has none.
    """
    if fused_slices is not None and method not in CONFIGS:
        raise SvdtuneError(f"{method} adapts the whole weight of a fused projection; leave fused_slices out")
    layers = {}
    for name in names:
        out, inside = matrix_shape(model.get_submodule(name))
        parts = {}
        if fused_slices is not None:
            parts = chosen_parts(fused_slices, CONFIGS[method].paper_slices, model, name, out)
        for part, rows in parts.items():
            layers[f"{name}.{part}"] = Target(name, rows, inside, rows.count)
        if not parts:
            layers[name] = Target(name, None, inside, out)
    return layers
