"""The files of a model folder's weights. Only this file reads an index, and it trusts nothing
there."""

import json
from pathlib import Path, PurePath, PureWindowsPath

from svdtune.errors import SvdtuneError
from svdtune.system import read_json, unique_keys

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
PICKLED_INDEX, PICKLED = "pytorch_model.bin.index.json", "pytorch_model.bin"


def shard_names(folder: Path) -> list[str] | None:
    """The safetensors files in a folder that Transformers would load; None if there are none.

    Raises:
        SvdtuneError: the index is damaged, or names a file that is not in the folder, such as one
            outside it; the configuration names files that Transformers alone would read.
    """
    _check_configuration(folder / "config.json")
    if (folder / SINGLE).is_file():  # Transformers prefers it where there are both
        return [SINGLE]
    if (folder / INDEX).is_file():
        return _listed(folder / INDEX)
    if not (folder / PICKLED).is_file() and (folder / PICKLED_INDEX).is_file():
        _listed(folder / PICKLED_INDEX)
    return None


def _check_configuration(path: Path) -> None:
    """Refuse a configuration that sends Transformers to files of unusual names."""
    if not path.is_file():
        return
    named = read_json(path).get("transformers_weights")
    if named is not None and named not in (SINGLE, INDEX):
        raise SvdtuneError(
            f"{path} names {named!r} as its weights (transformers_weights); svdtune reads {SINGLE} and {INDEX} of its folder "
            f"alone. Rename the file and remove the key, or do not use this model"
        )


def _listed(index: Path) -> list[str]:
    """The files that an index names, all of them in its folder."""
    try:
        document = json.loads(index.read_text(encoding="utf-8"), object_pairs_hook=unique_keys)
        names = sorted(set(document["weight_map"].values()))
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
    if missing := [name for name in names if not (index.parent / name).is_file()]:
        raise SvdtuneError(f"{index.parent} lacks {', '.join(missing)}, which its index names; download it again")
    return names


def _climbs(path: PurePath) -> bool:
    return bool(path.anchor) or ".." in path.parts
