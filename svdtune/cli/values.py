"""What every verb takes alike: `~` is one's home in a path, and no verb takes a number that is none
in a recipe or fits no machine, or a word that is empty."""

import inspect
import math
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from svdtune.errors import SvdtuneError
from svdtune.names import number_of

_LARGEST = 2**63  # whole numbers are kept in 64 bits: by torch, by files, and by the shapes of tensors


def check_words(words: Sequence[str]) -> None:
    """Refuse empty words, which stand where a variable of the shell was not set: `Path("")` is the
    folder one is in, and an empty name is no data set.

    What follows `--` is another program's.

    Raises:
        SvdtuneError: naming the word before.
    """
    before = ""
    for word in words:
        if word == "--":
            return
        option, given, value = word.partition("=")
        if not word.strip() or (option.startswith("--") and given and not value.strip()):
            where = option.strip() or before
            raise SvdtuneError(
                f"the value {f'of {where}' if where.startswith('--') else f'after {where}'} is empty; give one, or leave it "
                "out (a shell's variable that is not set is empty too; in a recipe's setting, null is none)"
            )
        before = word


def leaves(command: Any, name: str) -> Iterator[tuple[str, Any]]:
    """The commands of a verb that do something, by the words that call them."""
    if not hasattr(command, "commands"):
        yield name, command
    for inner, found in getattr(command, "commands", {}).items():
        yield from leaves(found, f"{name} {inner}")


def guard(verb: Any) -> Any:
    """The verb, whose options read numbers as recipes do, and `~` as a home in paths."""
    for _, command in leaves(verb, ""):
        hints = typing.get_type_hints(inspect.unwrap(command.callback))
        for option in command.params:
            option.process_value = _reading(option, _kinds(hints.get(option.name)))
    return verb


def _kinds(hint: Any) -> set[Any]:
    """The types that a hint such as `list[Path] | None` is made of."""
    return {hint}.union(*map(_kinds, typing.get_args(hint)))


def _reading(option: Any, kinds: set[Any]) -> Any:
    process = option.process_value
    written = next((name for name in option.opts if name.startswith("--")), option.name)

    def read(ctx: Any, value: Any) -> Any:
        for one in value if isinstance(value, list | tuple) else [value]:
            is_option = isinstance(one, str) and one.startswith("--")
            if is_option and any(one in (*other.opts, *other.secondary_opts) for other in ctx.command.params):
                raise SvdtuneError(f"{written} has no value: {one} is an option; a file of that name is ./{one}")
        if isinstance(value, str) and kinds & {int, float}:
            value = str(number(written, value, float in kinds))
        found = process(ctx, value)
        return at_home(found) if Path in kinds else found

    return read


def number(option: str, text: str, any_number: bool) -> int | float:
    """The number that an option is given, written as in a recipe, where `1_000` and `nan` are
    texts.

    Args:
        option: as it is written, for the message.
        text: its value.
        any_number: whether it takes other numbers than whole ones.

    Raises:
        SvdtuneError: it is no such number, infinite or none, or beyond 64 bits.
    """
    found = number_of(text)
    if found is None or not (any_number or isinstance(found, int)):
        expected = (
            "number as recipes have it, such as 1000, 0.5 or 1e-3" if any_number else "whole number, such as 1000"
        )
        raise SvdtuneError(f"{option} is {text!r:.60}; expected a {expected}")
    if isinstance(found, float) and not math.isfinite(found):
        raise SvdtuneError(f"{option} is {found}; expected a finite number")
    if abs(found) >= _LARGEST:
        raise SvdtuneError(f"{option} is {found:.3g}; expected a number of at most 64 bits")
    return found


def at_home(value: Any) -> Any:
    """A path, or a list of them, with its `~` as a folder, which a shell leaves as it is in quotes
    and behind `=`.

    Raises:
        SvdtuneError: there is no such home.
    """
    if value is None or isinstance(value, list | tuple):
        return value and [at_home(one) for one in value]
    try:
        return Path(value).expanduser()  # Typer 0.16 makes paths of texts later
    except RuntimeError as error:
        raise SvdtuneError(
            f"{value} begins with the home of a user who is not here; write ./{value} for a file of that name, or the "
            "path in full"
        ) from error
