"""What a user types: names of what is on this disk or on the hub, answered here where they can, and
with what comes near, before a network is asked; names of a model's parts; and numbers."""

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from svdtune.errors import SvdtuneError

_NEAR = 0.75  # of 1, how alike two names are
# How YAML 1.2's core schema writes numbers (section 10.3.2).
INTEGER = "[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+"
FLOAT = r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
_BASES = {"0o": 8, "0x": 16}


def is_named(name: str, key: str) -> bool:
    """Whether `key` is a module's or a parameter's name, or the last parts of it."""
    return f".{name}".endswith(f".{key}")


def number_of(text: str) -> int | float | None:
    """The number that a text is in a recipe; None where it is none there, as `1_000` and `nan`."""
    text = text.strip()
    if re.fullmatch(INTEGER, text):
        try:
            return int(text, _BASES.get(text[:2], 10))
        except ValueError:  # of more digits than Python reads
            return None
    return float(text.lower().replace(".inf", "inf").replace(".nan", "nan")) if re.fullmatch(FLOAT, text) else None


def depth_of(module: str) -> int:
    """The number of the layer that a module is in: the first number in its name, or 0."""
    number = re.search(r"\.(\d+)\.", f".{module}.")
    return int(number.group(1)) if number else 0


def meant(given: str | Path, known: Sequence[str] = (), *, folders: bool = False) -> str:
    """The end of a message about a path that is not there: where was looked, and what comes near.

    Args:
        given: the path or name.
        known: names that would do too.
        folders: whether only a folder or a `.gguf` file would do.
    """
    near = _near(Path(given).expanduser(), str(given), known, folders)
    return f" (looked in {Path.cwd()})" + (f"; did you mean {near}?" if near else "")


def check_hub_name(
    name: str, what: str, expected: str, known: Sequence[str] = (), kind: Literal["model", "dataset"] = "model"
) -> None:
    """Refuse a name that can be none on the hub, or is meant for what lies here: its folder is
    here, or a name beside it is nearly the same. What the hub's cache has is never refused.

    Args:
        name: what was typed, which is no path that is there.
        what: it is to be, such as "model".
        expected: what would do, for the message.
        known: names that are neither here nor on the hub.
        kind: of what the hub has.

    Raises:
        SvdtuneError: where was looked, what comes near, and how to take the name from the hub.
    """
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    path = Path(name).expanduser()
    here = f"there is no {what} {name}{meant(name, known, folders=kind == 'model')}"
    try:
        validate_repo_id(name)
        cached = try_to_load_from_cache(name, _A_FILE[kind], repo_type=kind)
    except HFValidationError as error:
        raise SvdtuneError(f"{here} It is no name on the hub either; expected {expected}") from error
    local = "/" in name and path.parent.is_dir()
    if not isinstance(cached, str) and (local or _near(path, name, known, kind == "model")):
        raise SvdtuneError(
            f"{here} Expected {expected}. If {name} on the hub is meant, fetch it first: hf download {name}"
            + (" --repo-type dataset" if kind == "dataset" else "")
        )


_A_FILE = {"model": "config.json", "dataset": "README.md"}


def _near(path: Path, name: str, known: Sequence[str], folders: bool) -> str | None:
    """The path beside this one, or the known name, that is nearly the same."""
    there = list(path.parent.iterdir()) if path.parent.is_dir() else []
    fit = [one.name for one in there if not folders or one.is_dir() or one.suffix == ".gguf"]
    beside = difflib.get_close_matches(path.name, fit, n=1, cutoff=_NEAR)
    if beside:
        return str(path.with_name(beside[0]))
    return next(iter(difflib.get_close_matches(name, known, n=1, cutoff=_NEAR)), None)
