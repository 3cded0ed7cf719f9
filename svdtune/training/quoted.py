"""Numbers that a recipe has in quotes, as files written by other programs do."""

import copy
import typing
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from svdtune.errors import SvdtuneWarning
from svdtune.names import number_of
from svdtune.training.problems import type_error


def without_quotes(settings: dict[str, Any], model: type[BaseModel], method: type | None) -> dict[str, Any]:
    """The settings with quoted numbers as numbers, where a number is wanted and no text would do;
    one warning a number says so.

    Args:
        settings: of a recipe, by section; they stay as they are.
        model: the recipe's class.
        method: the configuration class of the recipe's method, if it has one.
    """
    if not _has_quoted_number(settings):
        return settings
    settings = copy.deepcopy(settings)
    for holder, name, path in [*_wanted(settings, model), *_wanted_of_method(settings, method)]:
        text, number = holder[name], number_of(holder[name])
        holder[name] = number
        warnings.warn(f"{path}: {text!r} is in quotes; it is read as the number {number}", SvdtuneWarning, stacklevel=4)
    return settings


def _has_quoted_number(settings: Any) -> bool:
    if isinstance(settings, dict | list):
        return any(map(_has_quoted_number, settings.values() if isinstance(settings, dict) else settings))
    return isinstance(settings, str) and number_of(settings) is not None


Found = tuple[Any, Any, str]  # the dictionary or list, the key in it, and the setting's dotted path


def _wanted(settings: dict[str, Any], model: type[BaseModel]) -> Iterator[Found]:
    """The texts that are numbers where pydantic misses one."""
    try:
        model.model_validate(settings)
    except ValidationError as error:
        for item in error.errors(include_url=False, include_context=False):
            if item["type"] in ("int_type", "float_type") and isinstance(item["input"], str):
                yield from _place(settings, item["loc"], item["input"])


def _place(settings: Any, loc: Sequence[int | str], text: str) -> Iterator[Found]:
    """Where a text stands. pydantic also counts what only it sees: the place of a single source in
    a list of one, and the name of a type in a union."""
    holder, names, inner = None, [], settings
    for name in loc:
        if name in inner if isinstance(inner, dict) else isinstance(inner, list) and isinstance(name, int):
            holder, inner = inner, inner[name]
            names.append(name)
    if holder is not None and inner == text and number_of(text) is not None:
        yield holder, names[-1], ".".join(map(str, names))


def _wanted_of_method(settings: dict[str, Any], method: type | None) -> Iterator[Found]:
    """The same of the method's section, whose types are its configuration's."""
    hints = typing.get_type_hints(method) if method is not None else {}
    given = settings["method"] if hints else {}
    for name, value in given.items():
        number = number_of(value) if isinstance(value, str) and name in hints else None
        if number is not None and type_error(hints[name], value) and not type_error(hints[name], number):
            yield given, name, f"method.{name}"
