"""Which safetensors files a model folder's weights lie in: the one place that reads an index, and
trusts nothing in it."""

import json
from pathlib import Path, PurePath, PureWindowsPath

from svdtune.errors import SvdtuneError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


def shard_names(folder: Path) -> list[str] | None:
    """The safetensors files that Transformers would load from a folder, by name in it; None where
    it has none.

    Raises:
        SvdtuneError: the index is damaged, or names a file that is not in the folder, such as one
            outside it.
    """
    index = folder / INDEX
    if (folder / SINGLE).is_file():  # Transformers prefers it where there are both
        return [SINGLE]
    if not index.is_file():
        return None
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise SvdtuneError(
            f"{index} is damaged: it has no weight_map from tensors to files ({error}); download the model again"
        ) from error
    for name in names:
        if not isinstance(name, str) or any(_climbs(kind(name)) for kind in (PurePath, PureWindowsPath)):
            raise SvdtuneError(
                f"{index} names {name!r}, which is no file of its folder; do not use this model, or download it again"
            )
    if not names:
        raise SvdtuneError(f"{index} names no files; download the model again")
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise SvdtuneError(f"{folder} lacks {', '.join(missing)}, which its index names; download it again")
    return names


def _climbs(path: PurePath) -> bool:
    return bool(path.anchor) or ".." in path.parts
