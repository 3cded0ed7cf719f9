"""Under which names a checkpoint stores a model's parameters.

A stored name may lack the base model's prefix, have one too many, or be an older one that
Transformers renames when it loads the checkpoint. A tied parameter may be stored under another of
its names. A tensor that Transformers does not take as it is, such as one expert of a layer that
keeps all of them in one parameter, is no parameter's.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from torch import nn
from transformers import PreTrainedModel


@dataclass(frozen=True)
class StoredNames:
    """Parameter names and stored names, matched.

    Attributes:
        own: by parameter name, the stored name of the tensor that is loaded under this very name.
        groups: by parameter name, all names of that one parameter, in the model's order.
    """

    own: Mapping[str, str] = field(default_factory=dict)
    groups: Mapping[str, list[str]] = field(default_factory=dict)

    def of(self, parameter: str) -> str | None:
        """The stored name of a parameter, under whichever of the parameter's names; None where it
        is not stored."""
        names = (parameter, *self.groups.get(parameter, ()))
        return next((self.own[name] for name in names if name in self.own), None)


def match_names(model: PreTrainedModel, stored: Iterable[str]) -> StoredNames:
    """Match a model's parameters with a checkpoint's names, as Transformers does when it loads
    them.

    Args:
        model: its parameters may be on the meta device.
        stored: the names in the checkpoint.
    """
    parameter_of = _loading_rule(model)
    own: dict[str, str] = {}
    for name in sorted(stored):
        if (parameter := parameter_of(name)) is not None:
            own.setdefault(parameter, name)
    return StoredNames(own, same_parameter(model))


def same_parameter(model: nn.Module) -> dict[str, list[str]]:
    """By parameter name, all names of that one parameter, in the model's order."""
    by_id: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        by_id.setdefault(id(parameter), []).append(name)
    return {name: names for names in by_id.values() for name in names}


def _loading_rule(model: PreTrainedModel) -> Callable[[str], str | None]:
    """What gives the parameter that a stored tensor is loaded into as it is, None where there is
    none."""
    state = model.state_dict()
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
    except ImportError:  # before Transformers 5
        prefix = f"{model.base_model_prefix}."

        def by_prefix(name: str) -> str | None:
            return next((own for own in (name, name.removeprefix(prefix), prefix + name) if own in state), None)

        return by_prefix

    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]

    def by_transforms(name: str) -> str | None:
        found, converter = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if found not in state and name in state:
            found, converter = rename_source_key(name, [], [], model.base_model_prefix, state)
        return found if found in state and converter is None else None

    return by_transforms
