"""A model on disk: its architecture without its weights, and its weights one at a time.

The architecture is built on the meta device from the configuration, so module names and types are
exactly those that PEFT will see. Weights come straight from safetensors shards or a GGUF file. A
file is opened for one tensor and closed again.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

from svdtune.checkpoint.architecture import MOST_LAYERS, build_model, check_depth
from svdtune.checkpoint.gguf import open_gguf
from svdtune.checkpoint.names import StoredNames, match_names, same_parameter
from svdtune.checkpoint.shards import shard_names
from svdtune.checkpoint.tensors import Shard, Stored, read_shard
from svdtune.errors import SvdtuneError
from svdtune.spectra import base_weight
from svdtune.system import explain_damage, first_line


@dataclass(frozen=True)
class Checkpoint:
    """A model on the meta device, and what is stored of it.

    Attributes:
        name: what was asked for.
        model: the architecture in evaluation mode; every parameter is on the meta device.
        readers: a function by parameter name, for those that the checkpoint holds; none where it
            has no weights.
        bytes: size of the stored weights.
        folder: where it lies; None for a GGUF file and for a model known by its shape alone.
        shards: its safetensors files.
        names: of the parameters in those files.
        commit: of the hub; None for a model of this disk.
        experts: for a parameter that holds several experts', what reads one of them as it lies in
            the parameter, by its number.
    """

    name: str
    model: PreTrainedModel
    readers: dict[str, Callable[[], Tensor]]
    bytes: int
    folder: Path | None = None
    shards: tuple[Shard, ...] = ()
    names: StoredNames = field(default_factory=StoredNames)
    commit: str | None = None
    experts: dict[str, Callable[[int], Tensor]] = field(default_factory=dict)

    @property
    def has_weights(self) -> bool:
        """Whether there are weights to read."""
        return bool(self.readers)

    @property
    def tensors(self) -> dict[str, Stored]:
        """Every tensor of the safetensors files, by its name there."""
        return {name: tensor for shard in self.shards for name, tensor in shard.tensors.items()}

    def weight(self, module_name: str) -> Tensor:
        """The weight [out, in] of a module, read now.

        Raises:
            SvdtuneError: the checkpoint does not hold it, or not in the architecture's shape.
        """
        parameter = f"{module_name}.weight"
        if not self.has_weights:
            raise SvdtuneError(
                f"{self.name} is a shape without weights, which are read here; name a model that has them"
            )
        if parameter not in self.readers:
            raise SvdtuneError(
                f"the checkpoint {self.name} has no tensor for {parameter}; it may be incomplete, or quantized in a way that "
                "stores something else. Point svdtune at the unquantized checkpoint"
            )
        module = self.model.get_submodule(module_name)
        expected = module.weight
        assert isinstance(expected, Tensor)
        tensor = self._checked(parameter, self.readers[parameter](), expected.shape)
        # A module of the same kind that holds the tensor, so that Conv1D and the like are read as
        # they always are.
        holder = type(module).__new__(type(module))
        nn.Module.__init__(holder)
        holder.weight = nn.Parameter(tensor, requires_grad=False)
        return base_weight(holder)

    def expert(self, parameter: str, index: int) -> Tensor:
        """One expert's part of a parameter that holds several experts, read now.

        Raises:
            SvdtuneError: the checkpoint does not hold it, or not in the architecture's shape.
        """
        if parameter not in self.experts:
            raise SvdtuneError(
                f"the checkpoint {self.name} has no tensors that {parameter} is read from one expert at a time; it may be "
                "incomplete, or quantized. Load the model, and plan and start there"
            )
        return self._checked(parameter, self.experts[parameter](index), self.model.get_parameter(parameter).shape[1:])

    def _checked(self, parameter: str, tensor: Tensor, expected: tuple[int, ...]) -> Tensor:
        """What was read, which is to be numbers of this shape."""
        if not tensor.is_floating_point() or tensor.element_size() == 1:
            raise SvdtuneError(
                f"{parameter} is stored as {str(tensor.dtype).removeprefix('torch.')} in the checkpoint {self.name}: these are "
                "codes, and their scales lie elsewhere. Point svdtune at the unquantized checkpoint, or dequantize this one"
            )
        if tensor.shape != expected:
            raise SvdtuneError(
                f"{parameter} has shape {tuple(tensor.shape)} in the checkpoint {self.name}, and its configuration asks for "
                f"{tuple(expected)}; they do not belong together"
            )
        return tensor


def open_checkpoint(
    model: str | Path,
    *,
    revision: str | None = None,
    weights: bool = True,
    architecture: str | None = None,
    labels: int | None = None,
    trust_remote_code: bool = False,
) -> Checkpoint:
    """Open a local folder, a GGUF file or a hub model, without reading a weight.

    Args:
        model: a path, or a hub name.
        revision: of a hub model.
        weights: whether they will be read. If not, of a hub model its configuration alone is
            downloaded, and a folder may hold no more than that.
        architecture: the class of Transformers to build the model in, if not the one that its
            configuration names.
        labels: outputs of a classifier, if not those that its configuration says.
        trust_remote_code: allow code from the model's folder or repository to run.

    Raises:
        SvdtuneError: there is no such model, it is stored in another format, it is damaged, or it
            cannot be downloaded.
    """
    path = Path(model).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        skeleton, stored = open_gguf(path, architecture, labels)
        names = StoredNames({name: name for name in stored}, same_parameter(skeleton))
        return Checkpoint(str(path), skeleton, _readers(names, stored), path.stat().st_size)
    folder = path if path.is_dir() else _download(str(model), revision, weights, trust_remote_code)
    if not (folder / "config.json").is_file():
        raise SvdtuneError(f"the model folder {folder} has no config.json; expected a Transformers model folder")
    needed = weights or (path.is_dir() and shard_names(folder) is not None)
    shards = tuple(read_shard(folder, name) for name in _safetensors(folder)) if needed else ()
    stored = {name: tensor.read for shard in shards for name, tensor in shard.tensors.items()}
    with explain_damage(f"{folder / 'config.json'} describes no model that can be built"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        check_depth(config, len(stored) if needed else MOST_LAYERS)
        skeleton = build_model(config, architecture, labels=labels, trust_remote_code=trust_remote_code)
    names = match_names(skeleton, stored)
    size = sum((folder / shard.name).stat().st_size for shard in shards)
    commit = None if path.is_dir() else folder.name  # as the hub's cache names its snapshots
    experts = _expert_readers(names, {name: tensor for shard in shards for name, tensor in shard.tensors.items()})
    return Checkpoint(str(model), skeleton, _readers(names, stored), size, folder, shards, names, commit, experts)


def _readers(names: StoredNames, stored: Mapping[str, Callable[[], Tensor]]) -> dict[str, Callable[[], Tensor]]:
    """A reader for each parameter, taken from the readers of the stored tensors."""
    places = {parameter: names.of(parameter) for parameter in names.groups}
    return {parameter: stored[place] for parameter, place in places.items() if place is not None}


def _expert_readers(names: StoredNames, stored: Mapping[str, Stored]) -> dict[str, Callable[[int], Tensor]]:
    """What reads one expert of a parameter that holds several. Its experts are stored one by one,
    or together."""

    def joined(experts: list[list[str]], index: int) -> Tensor:
        return torch.cat([stored[name].read() for name in experts[index]])

    found: dict[str, Callable[[int], Tensor]] = {
        parameter: stored[name].read for parameter, name in names.own.items() if len(stored[name].shape) == 3
    }
    return found | {parameter: partial(joined, experts) for parameter, experts in names.experts.items()}


def _download(name: str, revision: str | None, weights: bool, trust_remote_code: bool) -> Path:
    """The cached folder of a hub model: its configuration, and its safetensors and code if they are
    wanted."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        wanted = ["config.json"] + ["*.safetensors", "*.safetensors.index.json"] * weights
        wanted += ["*.py"] * trust_remote_code
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise SvdtuneError(
            f"{name!r} is neither a model folder, nor a .gguf file, nor a hub model that can be downloaded "
            f"({first_line(error)})"
        ) from error


def _safetensors(folder: Path) -> list[str]:
    """The names of a folder's shards."""
    names = shard_names(folder)
    if names is None:
        raise SvdtuneError(
            f"{folder} has no model.safetensors; convert another format first with "
            "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder)"
        )
    return names
