"""Recipe files: those that come with svdtune by name, and files on top of others.

`small` is recipes/small.yaml, and `sara/llama-7b-math-sara` the recipe in that folder. They lie
beside the package in a checkout, and inside it where a wheel was installed.

`extends: base.yaml` takes that file's settings and changes some. A section is changed setting by
setting, but for `method`, which is replaced: the settings of one method mean nothing to another;
and of `epochs` and `max_steps`, which exclude each other, the one that is said later stays. With
several files the later ones change the earlier ones. Paths are relative to the file that names
them.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from svdtune.errors import SvdtuneError
from svdtune.names import meant
from svdtune.training.yaml_files import read_text, read_yaml, write_yaml

_REPLACED = "method"
_IN_PLACE_OF = {"training.epochs": "training.max_steps", "training.max_steps": "training.epochs"}
_SECTIONS = "model, method, data, training, evaluation, output"


def read_extended(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The settings of a recipe file, those of the files that it extends included.

    Args:
        path: the YAML file.
        above: the files that extend it, to find a circle.

    Raises:
        SvdtuneError: if a file is missing, is not YAML, holds no settings, or extends itself.
    """
    if path.resolve() in above:
        raise SvdtuneError(f"{path} extends itself; take the circle out")
    if not path.is_file():
        named = f", which {above[-1]} extends" if above else ""
        raise SvdtuneError(f"there is no recipe {path}{named}")
    settings = read_yaml(read_text(path), str(path))
    if not isinstance(settings, dict):
        raise SvdtuneError(f"{path} holds no settings: expected the sections {_SECTIONS}")
    bases = settings.pop("extends", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise SvdtuneError(f"{path}: extends is {bases!r}; expected a file's name, or a list of them")
    merged: dict[str, Any] = {}
    for base in bases:
        merged = merge(merged, read_extended(path.parent / base, (*above, path.resolve())))
    return merge(merged, settings)


def replaced_by(changes: Mapping[str, Any]) -> set[str]:
    """The settings that changes take the place of, all by their dotted paths."""
    found = {_IN_PLACE_OF.get(path, path) for path, value in changes.items() if value is not None}
    return found - changes.keys()


def merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """The settings of `base` with `changes`; both stay as they are."""
    merged = dict(base)
    for section, value in changes.items():
        before = merged.get(section)
        if isinstance(before, dict) and isinstance(value, dict) and section != _REPLACED:
            replaced = replaced_by({f"{section}.{name}": one for name, one in value.items()})
            kept = {name: one for name, one in before.items() if f"{section}.{name}" not in replaced}
            merged[section] = {**kept, **value}
        else:
            merged[section] = value
    return merged


Kind = Literal["recipe", "study"]
_FOLDERS: dict[Kind, str] = {"recipe": "recipes", "study": "studies"}
PACKAGE = Path(__file__).resolve().parents[1]


def shipped(kind: Kind) -> dict[str, Path]:
    """The files of a kind by name; those whose names begin with _ are parts of others."""
    installed, checkout = PACKAGE / _FOLDERS[kind], PACKAGE.parent / _FOLDERS[kind]
    folder = installed if installed.is_dir() else checkout
    files = sorted(folder.rglob("[!_]*.yaml"), key=lambda path: (path.parent != folder, path))
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in files}


def find_file(given: str | Path, kind: Kind) -> Path:
    """The file that a user names by its path, or by its name if it comes with svdtune.

    Raises:
        SvdtuneError: there is neither; the message has what comes near.
    """
    if Path(given).is_file():
        return Path(given)
    names = shipped(kind)
    if str(given) in names:
        return names[str(given)]
    short = str(given).removesuffix(".yaml").removeprefix(f"{_FOLDERS[kind]}/")
    what = "recipe" if kind == "recipe" else "study file"
    told = f" (looked in {Path.cwd()}); did you mean {short}?" if short in names else meant(given, [*names])
    more = "" if told.endswith("?") else "; `svdtune recipes` lists those that come with svdtune"
    raise SvdtuneError(f"there is no {what} {given}{told}{more}")


def first_words(path: Path) -> str:
    """What a file says of itself in its first line."""
    return read_text(path).partition("\n")[0].removeprefix("#").strip()


def whole_text(path: Path) -> str:
    """A recipe that needs no other file: as it stands, or, where it extends others, its comments
    and all of its settings."""
    text = read_text(path)
    if "extends" not in read_yaml(text, str(path)):
        return text
    comments = [line for line in text.splitlines() if line.startswith("#")]
    return "\n".join([*comments, write_yaml(read_extended(path))])


def override(settings: dict[str, Any], changes: Mapping[str, Any]) -> None:
    """Change settings by their dotted paths, and leave out what the changes take the place of.

    Raises:
        SvdtuneError: as `set_at`.
    """
    for dotted, value in {**dict.fromkeys(replaced_by(changes)), **changes}.items():
        set_at(settings, dotted, value)


def set_at(settings: dict[str, Any], dotted: str, value: Any) -> None:
    """Set one setting by its dotted path, making the sections on the way.

    Raises:
        SvdtuneError: if the path leads through what is no section.
    """
    *sections, name = dotted.split(".")
    for depth, section in enumerate(sections, 1):
        if settings.get(section) is None:
            settings[section] = {}
        inner = settings[section]
        if not isinstance(inner, dict):
            raise SvdtuneError(f"--{dotted}: {'.'.join(sections[:depth])} is {inner!r} in the recipe, not a section")
        settings = inner
    settings[name] = value
