"""What every verb takes alike: `~` is one's home in a path, and no verb takes a number that is none
in a recipe or fits no machine, or a word that is empty."""

import inspect
import math
import typing
from collections.abc import Iterator, Mapping, Sequence
from functools import wraps
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


def at_home(value: Any, is_path: bool) -> Any:
    """The value of an option; where it is a path, or a list of them, with its `~` as a folder,
    which a shell leaves as it is in quotes and behind `=`.

    Args:
        value: as the command line has it.
        is_path: whether a text is to be a path.

    Raises:
        SvdtuneError: there is no such home.
    """
    if isinstance(value, list | tuple):
        return [at_home(one, is_path) for one in value]
    if is_path and isinstance(value, str):
        value = Path(value)
    try:
        return value.expanduser() if isinstance(value, Path) else value
    except RuntimeError as error:
        raise SvdtuneError(
            f"{value} begins with the home of a user who is not here; write ./{value} for a file of that name, or the "
            "path in full"
        ) from error


def leaves(command: Any, name: str) -> Iterator[tuple[str, Any]]:
    """The commands of a verb that do something, by the words that call them."""
    if not hasattr(command, "commands"):
        yield name, command
    for inner, found in getattr(command, "commands", {}).items():
        yield from leaves(found, f"{name} {inner}")


def guard(verb: Any) -> Any:
    """The verb, whose commands read numbers as recipes do, and refuse those that no option
    takes."""
    for _, command in leaves(verb, ""):
        command.parse_args = _reading(command)
        command.callback = _checked(command)
    return verb


def _reading(command: Any) -> Any:
    parse = command.parse_args
    hints = typing.get_type_hints(inspect.unwrap(command.callback))
    kinds = {name: {hint, *typing.get_args(hint)} & {int, float} for name, hint in hints.items()}
    options = {word: float in kinds[each.name] for each in command.params if kinds.get(each.name) for word in each.opts}

    @wraps(parse)
    def read(ctx: Any, words: list[str]) -> Any:
        return parse(ctx, list(with_numbers(words, options)))

    return read


def with_numbers(words: Sequence[str], options: Mapping[str, bool]) -> Iterator[str]:
    """The words of a command line, numbers written as Python reads them.

    Args:
        words: what follows the verb.
        options: those that take numbers, and whether other ones than whole.

    Raises:
        SvdtuneError: a value of theirs is no number in a recipe, where `1_000` and `nan` are texts.
    """
    waiting, before = iter(words), ""
    for word in waiting:
        option, given, value = word.partition("=")
        if word == "--":
            yield word
            yield from waiting
        elif before in options:
            yield _written(before, word, options[before])
            word = ""
        else:
            yield f"{option}={_written(option, value, options[option])}" if given and option in options else word
        before = word


def _written(option: str, text: str, any_number: bool) -> str:
    number = number_of(text)
    if number is None or not (any_number or isinstance(number, int)):
        expected = (
            "number as recipes have it, such as 1000, 0.5 or 1e-3" if any_number else "whole number, such as 1000"
        )
        raise SvdtuneError(f"{option} is {text!r:.60}; expected a {expected}")
    return str(number)


def _checked(command: Any) -> Any:
    work = command.callback

    @wraps(work)
    def checked(**given: Any) -> Any:
        check_numbers({_shown(option): given.get(option.name) for option in command.params})
        return work(**given)

    return checked


def check_numbers(given: dict[str, Any]) -> None:
    """Refuse numbers that are infinite or none, and whole ones beyond 64 bits.

    Args:
        given: values by how their option is written.

    Raises:
        SvdtuneError: naming the option.
    """
    for option, value in given.items():
        for number in _numbers(value):
            if isinstance(number, float) and not math.isfinite(number):
                raise SvdtuneError(f"{option} is {number}; expected a finite number")
            if abs(number) >= _LARGEST:
                raise SvdtuneError(f"{option} is {number:.3g}; expected a number of at most 64 bits")


def _numbers(value: Any) -> Iterator[int | float]:
    for one in value if isinstance(value, list | tuple) else [value]:
        if isinstance(one, int | float) and not isinstance(one, bool):
            yield one


def _shown(option: Any) -> str:
    return next((name for name in option.opts if name.startswith("--")), option.name or "")
