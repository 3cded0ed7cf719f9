"""The settings of a PEFT configuration: the fields that a user sets. Saving and loading write the
others."""

import inspect
from dataclasses import MISSING, Field, fields
from enum import Enum
from typing import Any

from peft import PeftConfig

# PEFT keeps these for itself in the configuration of every method; of its common fields a user
# gives `task_type` alone.
_OF_PEFT = {field.name for field in fields(PeftConfig)} - {"task_type"}
# The metadata of a field that svdtune writes itself.
WRITTEN = {"written": True}


def settings(config: PeftConfig | type[PeftConfig]) -> list[Field[Any]]:
    """The fields of a configuration, or of its class, that a user sets."""
    return [
        field
        for field in fields(config)
        if field.init and field.name not in _OF_PEFT and not field.metadata.get("written", False)
    ]


def explain(config: type[PeftConfig]) -> None:
    """Put every setting with its default at the end of a class's docstring, for `help()`."""
    usual = config()
    lines = [
        f"    {each.name} = {getattr(usual, each.name)!r}: {each.metadata.get('help')}" for each in settings(config)
    ]
    words = [inspect.cleandoc(config.__doc__ or ""), "", "Every setting, with its default:", *lines]
    config.__doc__ = "\n".join(words)


def chosen(config: PeftConfig) -> dict[str, Any]:
    """The settings that differ from their defaults, by name, as JSON and YAML hold them."""
    found = {}
    for field in settings(config):
        value = getattr(config, field.name)
        default = field.default if field.default_factory is MISSING else field.default_factory()
        if value != default:
            found[field.name] = _plain(value)
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, set):
        return sorted(value)
    return value.value if isinstance(value, Enum) else value
