"""Things by name, to which the laboratory adds its own; and the one door through which the
laboratory is loaded.

`svdtune.lab` holds what reproduces the papers. The rest of svdtune works without it, and reaches it
here alone: a registry that lacks a name, or is asked for all of them, imports the part of the
laboratory that adds to it, `svdtune.lab.<part>`. That part calls `Registry.add` when it is
imported. Functions of the user's go by the path to them.
"""

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any, TypeVar

from svdtune.errors import SvdtuneError

_LAB = "svdtune.lab"

T = TypeVar("T")


@cache
def has_lab() -> bool:
    """Whether the laboratory is installed."""
    found = find_spec(_LAB)
    # an empty folder is found too, without an origin
    return found is not None and found.origin is not None


def load(part: str) -> None:
    """Import a part of the laboratory, so that what it adds is known; without a laboratory, do
    nothing."""
    if has_lab():
        import_module(f"{_LAB}.{part}")


def is_function(name: str) -> bool:
    """Whether a name is the path of a function, "package.module:function"."""
    module, colon, function = name.partition(":")
    return bool(colon) and function.isidentifier() and all(part.isidentifier() for part in module.split("."))


def import_function(path: str, what: str) -> Callable[..., Any]:
    """A function of the user's.

    Args:
        path: "package.module:function", found as Python finds it or from the working directory.
        what: it is for, for messages.

    Raises:
        SvdtuneError: there is none.
    """
    module, _, name = path.partition(":")
    here = os.getcwd()
    sys.path.append(here)
    try:
        found: Any = getattr(import_module(module), name, None)
    except Exception as error:  # whatever the module does while it is imported
        raise SvdtuneError(
            f"{what}: {path!r} cannot be imported: {error}; expected package.module:function, found from here or installed"
        ) from error
    finally:
        if sys.path[-1:] == [here]:  # and not an entry before it that is the user's own
            del sys.path[-1]
    if not callable(found):
        raise SvdtuneError(f"{what}: {module} has no function {name!r}")
    function: Callable[..., Any] = found
    return function


def lab_note() -> str:
    """Where the laboratory is missing, the words that say so, for a message about an unknown name;
    else nothing."""
    return "" if has_lab() else f"; those of the papers belong to {_LAB}, which is not installed"


class Registry(Mapping[str, T]):
    """Things by name, in the order in which they were added.

    Args:
        part: the part of the laboratory that adds to it.
        own: what is there without the laboratory.
    """

    def __init__(self, part: str, own: Mapping[str, T] | None = None) -> None:
        self._part = part
        self._things = dict(own or {})

    def add(self, name: str, thing: T) -> None:
        """Make a thing known by its name.

        Raises:
            ValueError: another thing has that name.
        """
        if self._things.setdefault(name, thing) is not thing:
            raise ValueError(f"there is another {name!r} already")

    def listed(self) -> str:
        """All names, and where the laboratory is missing, that it is: the end of a message about an
        unknown name."""
        return ", ".join(self) + lab_note()

    def __getitem__(self, name: str) -> T:
        if name not in self._things:
            load(self._part)
        return self._things[name]

    def __iter__(self) -> Iterator[str]:
        load(self._part)
        return iter(self._things)

    def __len__(self) -> int:
        load(self._part)
        return len(self._things)
