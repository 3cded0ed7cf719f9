"""Recipes and studies that come with svdtune, by name: `small` is recipes/small.yaml, and
`sara/llama-7b-math-sara` the recipe in that folder.

They lie beside the package in a checkout, and inside it where a wheel was installed.
"""

from pathlib import Path
from typing import Literal

from svdtune.errors import SvdtuneError
from svdtune.names import meant
from svdtune.training.inheritance import read_extended
from svdtune.training.yaml_files import read_text, read_yaml, write_yaml

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
