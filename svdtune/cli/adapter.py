"""The adapter that a command line asks for: a recipe's, or one for a model in the recipe's own
words."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from svdtune.errors import SvdtuneError

if TYPE_CHECKING:
    import typer

    from svdtune.api.inputs import WantedAdapter
    from svdtune.training.problems import Problem


def asked(
    verb: str,
    what: str,
    default: str,
    method: str | None,
    settings: Mapping[str, Any],
    words: Sequence[str],
    options: Sequence[str],
    **origin: Any,
) -> "WantedAdapter":
    """Make sense of a command line.

    Args:
        verb: the verb, for messages.
        what: a recipe file, or a model.
        default: the method for a model where none is named.
        method: `--method`: a name, or a section as YAML; None for that of the recipe, or `default`.
        settings: of the method, by options of their own (`--r`); None for those not given.
        words: what is left of the command line: dotted settings and their values.
        options: the verb's own options, to name the nearest where one is mistaken.
        **origin: `revision` and `trust_remote_code`; beside a recipe they go before its own.

    Raises:
        SvdtuneError: with everything that is wrong.
    """
    from svdtune.api.inputs import is_recipe, of_recipe, of_section
    from svdtune.training.collection import set_at
    from svdtune.training.problems import refuse
    from svdtune.training.recipe import load_recipe, parse_overrides

    words = [*_as_words(method, settings), *words]
    changes = list(parse_overrides(words))
    recipe = is_recipe(what)
    refuse(list(_unknown(changes, recipe, options)), verb)
    if recipe:
        own = [f"--model.{name}={json.dumps(value)}" for name, value in origin.items() if value]
        return of_recipe(verb, load_recipe(what, [*words, *own]))
    given: dict[str, Any] = {"method": {"name": default}}
    for dotted, value in changes:
        set_at(given, dotted, value)
    return of_section(verb, what, given["method"], **origin)


def _as_words(method: str | None, settings: Mapping[str, Any]) -> Iterator[str]:
    """Options of their own as dotted settings."""
    from svdtune.training.yaml_files import read_yaml

    if method is not None:
        section = read_yaml(method, "--method")
        yield from ("--method", json.dumps(section if isinstance(section, dict) else {"name": method}))
    for name, value in settings.items():
        if value is not None:
            yield from (f"--method.{name}", json.dumps(value))


def _unknown(changes: Sequence[tuple[str, Any]], is_recipe: bool, options: Sequence[str]) -> Iterator["Problem"]:
    """Options that the verb does not have; a recipe's settings count as its own beside a recipe."""
    from svdtune.methods import MoSaraConfig, SaraConfig, SorsaConfig
    from svdtune.methods.settings import settings
    from svdtune.training.problems import Problem, unknown
    from svdtune.training.recipe import Recipe

    sections = [*Recipe.model_fields] if is_recipe else ["method"]
    fields = (field for config in (SaraConfig, MoSaraConfig, SorsaConfig) for field in settings(config))
    known = list(dict.fromkeys([*options, *(f"method.{field.name}" for field in fields)]))
    for dotted, _ in changes:
        if dotted.partition(".")[0] not in sections:
            yield Problem(f"--{dotted}", unknown(dotted.replace("-", "_"), known, known))


def options_of(ctx: "typer.Context") -> list[str]:
    """The names of a verb's own options, without their dashes."""
    return [name.removeprefix("--") for option in ctx.command.params for name in option.opts if name.startswith("--")]


def names(text: str | None) -> list[str] | str | None:
    """Comma-separated names as a list; anything with another special character is one regular
    expression."""
    if text is None or text == "all-linear":
        return text
    parts = [part.strip() for part in text.split(",") if part.strip()]
    plain = all(part.replace("_", "").replace(".", "").replace("-", "").isalnum() for part in parts)
    if plain:
        return parts
    try:
        re.compile(text)
    except re.error as error:
        raise SvdtuneError(f"{text!r} is neither names nor a regular expression: {error}") from error
    return text
