"""Problems of a recipe, found all at once: each with its path, what was given, and the nearest
right name; and numbers in quotes, as files written by other programs have them, which are none."""

import copy
import difflib
import json
import types
import typing
import warnings
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

from pydantic import BaseModel, PydanticSchemaGenerationError, PydanticUserError, TypeAdapter, ValidationError

from svdtune.errors import SvdtuneError, SvdtuneWarning
from svdtune.names import number_of


class Problem(NamedTuple):
    """What is wrong (`message`) at a setting (`path`, dotted; empty for the whole recipe)."""

    path: str
    message: str


def refuse(problems: Sequence[Problem], source: str, typed: Collection[str] = ()) -> None:
    """Raise one SvdtuneError that lists all problems of `source`, and apart from them those at the
    paths that were `typed` on the command line; do nothing if there are none."""
    found: dict[str, list[str]] = {source: [], "the command line": []}
    for path, message in problems:
        here = any(f"{path}.".startswith(f"{one}.") for one in typed)
        found["the command line" if here else source].append(f"  {path}: {message}" if path else f"  {message}")
    blocks = []
    for where, lines in found.items():
        count = "one problem" if len(lines) == 1 else f"{len(lines)} problems"
        blocks += [f"{where} has {count}:", *lines] if lines else []
    if blocks:
        raise SvdtuneError("\n".join(blocks))


def from_pydantic(error: ValidationError, model: type[BaseModel]) -> Iterator[Problem]:
    """Translate pydantic's errors about `model`."""
    for item in error.errors(include_url=False, include_context=False):
        path = ".".join(str(name) for name in item["loc"] if name != "")  # which one source is called
        if item["type"] == "extra_forbidden":
            yield Problem(path, unknown(path, list(settings_at(model, item["loc"][:-1])), list(all_settings(model))))
        elif item["type"] == "missing":
            yield Problem(path, "is required")
        elif item["type"] in ("too_short", "string_too_short"):
            yield Problem(path, f"is empty; expected {'a text' if 'string' in item['type'] else 'one entry or more'}")
        elif item["type"] == "value_error":
            yield Problem(path, item["msg"].removeprefix("Value error, "))
        elif item["type"] in ("model_type", "model_attributes_type", "dict_type"):
            yield Problem(path, f"expected a section with settings of its own; got {item['input']!r:.60}")
        else:
            message = item["msg"].removeprefix("Input should be ")
            yield Problem(path, f"expected {message}; got {item['input']!r:.60}")


def unknown(path: str, siblings: Sequence[str], everywhere: Sequence[str] = ()) -> str:
    """The message about a setting that does not exist: the nearest name beside it, or the same name
    elsewhere."""
    name = path.rpartition(".")[2]
    near = difflib.get_close_matches(name, siblings, n=1)
    # lr; the first letter of one word says nothing
    near = near or [other for other in siblings if "_" in other and "".join(w[0] for w in other.split("_")) == name]
    near = near or [other for other in everywhere if other.rpartition(".")[2] == name]
    if near:
        return f"unknown setting; did you mean {near[0]}?"
    return f"unknown setting; there are {', '.join(siblings)}"


def settings_at(model: type[BaseModel], loc: Sequence[int | str]) -> Iterator[str]:
    """Names of the settings of the section at `loc`."""
    names = iter(loc)
    for name in names:
        annotation = model.model_fields[str(name)].annotation if str(name) in model.model_fields else None
        inner = _section(annotation)
        if inner is None:
            return
        if typing.get_origin(annotation) in (dict, list):
            next(names, None)  # what the section is called there, or its place
        model = inner
    yield from model.model_fields


def all_settings(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Dotted paths of all settings."""
    for name, field in model.model_fields.items():
        yield prefix + name
        section = _section(field.annotation)
        if section is not None:
            yield from all_settings(section, f"{prefix}{name}.")


def _section(annotation: Any) -> type[BaseModel] | None:
    """The section class in an annotation such as `Data`, `Data | None`, `dict[str, Data]` or
    `list[Data]`."""
    several = typing.get_origin(annotation) in (types.UnionType, dict, list)
    options = typing.get_args(annotation) if several else (annotation,)
    sections = [option for option in options if isinstance(option, type) and issubclass(option, BaseModel)]
    return sections[0] if sections else None


def type_error(hint: Any, value: Any) -> str | None:
    """What is wrong with a value, by a configuration's type hint; None also where the hint
    cannot be checked."""
    try:
        adapter = TypeAdapter(hint)
    except (PydanticSchemaGenerationError, PydanticUserError):
        return None
    try:
        # From JSON, a list may become a tuple or a set, and a text an enum; otherwise types must
        # match exactly.
        adapter.validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        expected = dict.fromkeys(item["msg"].removeprefix("Input should be ") for item in error.errors())
        return f"expected {' or '.join(expected)}; got {value!r:.60}"
    return None


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
