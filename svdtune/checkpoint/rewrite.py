"""A checkpoint written anew with some of its weights replaced, one tensor in memory at a time.

The files, their names and order and everything beside the weights stay those of the base.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from svdtune.checkpoint.model import Checkpoint
from svdtune.checkpoint.shards import INDEX, SINGLE
from svdtune.checkpoint.tensors import FLOATING, Stored
from svdtune.checkpoint.writer import Computed, TensorWriter
from svdtune.errors import SvdtuneError
from svdtune.system import read_json

CARD = "README.md"
# Not copied: weights in other formats, the base's card, and hidden files.
_LEFT_OUT = {".safetensors", ".bin", ".gguf", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".ot", ".npz"}
_FOLDERS = ("additional_chat_templates",)

Replacement = Callable[[str, Stored], Mapping[str, Stored | Computed]]


def folder_of(base: Checkpoint) -> Path:
    """The folder of a checkpoint.

    Raises:
        SvdtuneError: it is a GGUF file or a shape.
    """
    if base.folder is None:
        raise SvdtuneError(
            f"{base.name} is no folder of safetensors, and only such a checkpoint is written anew; convert it first with "
            "AutoModelForCausalLM.from_pretrained(...).save_pretrained(folder)"
        )
    return base.folder


def write_weights(base: Checkpoint, work: Path, replacement: Replacement) -> None:
    """Write every shard of a checkpoint, and its index.

    Args:
        base: from a folder.
        work: where to write.
        replacement: (name, stored tensor) → what is written in its place, by name, in order.
    """
    weight_map: dict[str, str] = {}
    total = 0
    for shard in base.shards:
        written: dict[str, Stored | Computed] = {}
        for name, stored in shard.tensors.items():
            written |= replacement(name, stored)
        (work / shard.name).parent.mkdir(parents=True, exist_ok=True)
        with TensorWriter(work / shard.name, written, shard.metadata) as file:
            for name, tensor in written.items():
                file.write(name, tensor)
        weight_map |= dict.fromkeys(written, shard.name)
        total += sum(tensor.nbytes for tensor in written.values())
    if SINGLE not in weight_map.values():
        index = read_json(folder_of(base) / INDEX)
        metadata = index.get("metadata")
        index["metadata"] = (metadata if isinstance(metadata, dict) else {}) | {"total_size": total}
        index["weight_map"] = dict(sorted(weight_map.items()))
        (work / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def copy_other_files(base: Checkpoint, work: Path) -> None:
    """Copy tokenizer, configurations and whatever else stands in a checkpoint's folder beside its
    weights and its card."""
    for path in sorted(folder_of(base).iterdir()):
        weights = path.suffix in _LEFT_OUT or path.name.endswith(".index.json")
        if path.is_file() and not weights and path.name != CARD and not path.name.startswith("."):
            shutil.copyfile(path, work / path.name)
        elif path.is_dir() and path.name in _FOLDERS:
            shutil.copytree(path, work / path.name)


def floating(stored: Stored) -> torch.dtype:
    """The dtype of a stored tensor of numbers.

    Raises:
        SvdtuneError: it holds codes.
    """
    if stored.dtype not in FLOATING:
        raise SvdtuneError(
            f"the base stores {stored.name} as {stored.dtype}: a quantized checkpoint takes no new weight. Name the "
            "full-precision checkpoint that it was made from"
        )
    return FLOATING[stored.dtype]
