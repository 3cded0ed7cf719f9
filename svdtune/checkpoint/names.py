"""The names under which a checkpoint stores a model's parameters.

A stored name may lack the base model's prefix, have one too many, or be an older name that
Transformers changes when it loads. A tied parameter may be stored under another of its names. Some
tensors are no parameter of their own, but a part of an expert's matrix: Transformers keeps all
experts of some layers in one parameter.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from torch import nn
from transformers import PreTrainedModel

Part = tuple[int, int]
"""An expert, and a place in its matrix."""
# How Transformers makes a parameter of experts that are stored one by one.
_STACKING = ([("MergeModulelist", 0)], [("MergeModulelist", 0), ("Concatenate", 1)])


@dataclass(frozen=True)
class StoredNames:
    """Parameter names and stored names, matched.

    Attributes:
        own: by parameter name, the stored name of the tensor that is loaded under this very name.
        groups: by parameter name, all names of that one parameter, in the model's order.
        experts: by the name of a parameter that holds several experts', for each of them the stored
            names of what its matrix is made of, rows on rows.
    """

    own: Mapping[str, str] = field(default_factory=dict)
    groups: Mapping[str, list[str]] = field(default_factory=dict)
    experts: Mapping[str, list[list[str]]] = field(default_factory=dict)

    def of(self, parameter: str) -> str | None:
        """The stored name of a parameter, by any of the parameter's own names; None if it is not
        stored."""
        names = (parameter, *self.groups.get(parameter, ()))
        return next((self.own[name] for name in names if name in self.own), None)


def match_names(model: PreTrainedModel, stored: Iterable[str]) -> StoredNames:
    """Match a model's parameters with a checkpoint's names, as Transformers does when it loads.

    Args:
        model: its parameters may be on the meta device.
        stored: the names in the checkpoint.
    """
    parameter_of = _loading_rule(model)
    own: dict[str, str] = {}
    parts: dict[str, dict[tuple[int, int], str]] = {}
    for name in sorted(stored):
        parameter, part = parameter_of(name) or (None, None)
        if parameter is not None and part is None:
            own.setdefault(parameter, name)
        elif parameter is not None and part is not None:
            parts.setdefault(parameter, {})[part] = name
    experts = {parameter: found for parameter, names in parts.items() if (found := _by_expert(names))}
    return StoredNames(own, same_parameter(model), experts)


def _by_expert(names: Mapping[Part, str]) -> list[list[str]] | None:
    """The names by expert and place; None where some are missing."""
    experts, places = (1 + max(numbers) for numbers in zip(*names, strict=True))
    if len(names) < experts * places:
        return None
    return [[names[expert, place] for place in range(places)] for expert in range(experts)]


def same_parameter(model: nn.Module) -> dict[str, list[str]]:
    """By parameter name, all names of that one parameter, in the model's order."""
    by_id: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        by_id.setdefault(id(parameter), []).append(name)
    return {name: names for names in by_id.values() for name in names}


def _loading_rule(model: PreTrainedModel) -> Callable[[str], tuple[str, Part | None] | None]:
    """What gives the parameter that a stored tensor is loaded into, as it is or as a part of an
    expert's matrix; None where there is none."""
    state = model.state_dict()
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
    except ImportError:  # before Transformers 5
        prefix = f"{model.base_model_prefix}."

        def by_prefix(name: str) -> tuple[str, Part | None] | None:
            found = (own for own in (name, name.removeprefix(prefix), prefix + name) if own in state)
            return next(((own, None) for own in found), None)

        return by_prefix

    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]

    places = {
        pattern: place
        for converter in converters
        if [(type(step).__name__, getattr(step, "dim", None)) for step in converter.operations] in _STACKING
        for place, pattern in enumerate(converter.source_patterns)
    }

    def by_transforms(name: str) -> tuple[str, Part | None] | None:
        found, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if found not in state and name in state:
            found, pattern = rename_source_key(name, [], [], model.base_model_prefix, state)
        if found not in state or (pattern is not None and pattern not in places):
            return None
        if pattern is None:
            return found, None
        expert = re.search(re.escape(pattern).replace(r"\*", r"(\d+)"), name)
        return (found, (int(expert[1]), places[pattern])) if expert else None

    return by_transforms
