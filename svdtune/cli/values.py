"""What no option of any verb takes: a number that is none or fits no machine, and a word that is
empty."""

import math
from collections.abc import Iterator, Sequence
from functools import wraps
from typing import Any

from svdtune.errors import SvdtuneError

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
    """The verb, whose commands refuse numbers that no option takes."""
    for _, command in leaves(verb, ""):
        command.callback = _checked(command)
    return verb


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
