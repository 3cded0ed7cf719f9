"""A model's architecture without its weights, and its weights one at a time.

The architecture is built on the meta device from the configuration, so module names and types are exactly those that PEFT
will see. Weights come straight from safetensors shards or a GGUF file; each file is opened for one tensor and closed again, so
that memory holds one weight and not what else was touched in the file.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)

from svdtune.checkpoint.shards import shard_names
from svdtune.errors import SvdtuneError
from svdtune.spectra import base_weight
from svdtune.system import is_out_of_memory


@dataclass(frozen=True)
class Checkpoint:
    """A model on the meta device and what reads each of its parameters.

    Attributes:
        name: what was asked for.
        model: the architecture; every parameter is on the meta device.
        readers: a function by parameter name, for those that the checkpoint holds.
        bytes: size of the stored weights.
    """

    name: str
    model: PreTrainedModel
    readers: dict[str, Callable[[], Tensor]]
    bytes: int

    def weight(self, module_name: str) -> Tensor:
        """The weight [out, in] of a module, read now.

        Raises:
            SvdtuneError: the checkpoint does not hold it, or not in the architecture's shape.
        """
        parameter = f"{module_name}.weight"
        if parameter not in self.readers:
            raise SvdtuneError(
                f"the checkpoint {self.name} has no tensor for {parameter}; it may be incomplete, or quantized in a way that "
                "stores something else. Point svdtune at the unquantized checkpoint"
            )
        tensor = self.readers[parameter]()
        module = self.model.get_submodule(module_name)
        if tensor.shape != module.weight.shape:
            raise SvdtuneError(
                f"{parameter} has shape {tuple(tensor.shape)} in the checkpoint {self.name}, and its configuration asks for "
                f"{tuple(module.weight.shape)}; they do not belong together"
            )
        # A module of the same kind that holds the tensor, so that Conv1D and the like are read as they always are.
        holder = type(module).__new__(type(module))
        nn.Module.__init__(holder)
        holder.weight = nn.Parameter(tensor, requires_grad=False)
        return base_weight(holder)


def open_checkpoint(model: str | Path, *, revision: str | None = None, weights: bool = True) -> Checkpoint:
    """Open a local folder, a GGUF file or a hub model, without reading a weight.

    Args:
        model: a path, or a hub name.
        revision: of a hub model.
        weights: whether they will be read. If not, of a hub model its configuration alone is downloaded, and a folder may
            hold no more than that.

    Raises:
        SvdtuneError: there is no such model, it is stored in another format, or it cannot be downloaded.
    """
    path = Path(model).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        return _open_gguf(path)
    folder = path if path.is_dir() else _download(str(model), revision, weights)
    if not (folder / "config.json").is_file():
        raise SvdtuneError(f"the model folder {folder} has no config.json; expected a Transformers model folder")
    needed = weights or (path.is_dir() and shard_names(folder) is not None)
    files = _safetensors(folder) if needed else []
    keys = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as shard:
                keys |= dict.fromkeys(shard.keys(), file)
        except (OSError, SafetensorError) as error:
            raise SvdtuneError(f"{file} cannot be read ({error}); download the checkpoint again") from error
    try:
        config = AutoConfig.from_pretrained(folder)
        _check_depth(config, len(keys) if needed else _MOST_LAYERS)
        skeleton = _build(config)
    except SvdtuneError:
        raise
    except Exception as error:  # a damaged config.json comes out as any of a dozen types
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise SvdtuneError(f"{folder / 'config.json'} describes no model that can be built: {reason:.200}") from error
    readers = {
        name: lambda file=keys[key], key=key: _read_safetensors(file, key) for name, key in _match(skeleton, set(keys))
    }
    return Checkpoint(str(model), skeleton, readers, sum(file.stat().st_size for file in files))


# Of a model whose weights are not there to tell.
_MOST_LAYERS = 1000


def _check_depth(config: PretrainedConfig, tensors: int) -> None:
    """Refuse a damaged number of layers, which would be built until the memory ends."""
    layers = getattr(config, "num_hidden_layers", None)
    if isinstance(layers, int) and layers > 2 * tensors + 10:  # layers may share their weights
        raise SvdtuneError(
            f"the configuration asks for {layers:,} layers, and the weights are {tensors:,} tensors: they do not belong "
            "together, or are damaged; download the model again"
        )


def _build(config: PretrainedConfig) -> PreTrainedModel:
    """The model of a configuration on the meta device, in the class that training would load it in.

    That is the class it was saved from; a causal language model where none is named or it was saved without its head; the
    bare model where there is no such class.
    """
    heads = [name for name in getattr(config, "architectures", None) or [] if "For" in name or "LMHead" in name]
    cls = next((getattr(transformers, name) for name in heads if hasattr(transformers, name)), None)
    with torch.device("meta"):
        if cls is not None:
            return cls(config)
        causal = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
        return (AutoModelForCausalLM if causal else AutoModel).from_config(config)


def _download(name: str, revision: str | None, weights: bool) -> Path:
    """The cached folder of a hub model: its configuration, and its safetensors where weights are asked for."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        wanted = ["config.json"] + ["*.safetensors", "*.safetensors.index.json"] * weights
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise SvdtuneError(
            f"{name!r} is neither a model folder, nor a .gguf file, nor a hub model that can be downloaded ({reason})"
        ) from error


def _safetensors(folder: Path) -> list[Path]:
    """The shards of a folder's checkpoint, in order of name."""
    names = shard_names(folder)
    if names is None:
        raise SvdtuneError(
            f"{folder} has no model.safetensors; convert another format first with "
            "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder)"
        )
    return [folder / name for name in names]


def _match(model: PreTrainedModel, keys: set[str]) -> Iterator[tuple[str, str]]:
    """Yield (parameter name, checkpoint key) for each parameter of the model that the checkpoint holds.

    As Transformers does: a key may lack the base model's prefix, or have one too many, or be renamed since; a tied parameter
    may be stored under the name of the one it is tied to.
    """
    prefix = f"{model.base_model_prefix}." if model.base_model_prefix else ""
    renamed = _renamed(model, keys)
    tied = getattr(model, "_tied_weights_keys", None)
    tied = tied if isinstance(tied, dict) and getattr(model.config, "tie_word_embeddings", False) else {}
    for name, _ in model.named_parameters(remove_duplicate=False):
        for wanted in (name, tied.get(name)):
            if wanted is None:
                continue
            spellings = (wanted, wanted.removeprefix(prefix) if prefix else wanted, prefix + wanted)
            key = next((key for key in spellings if key in keys), None) or renamed.get(wanted)
            if key is not None:
                yield name, key
                break


def _renamed(model: PreTrainedModel, keys: set[str]) -> dict[str, str]:
    """Parameter name → checkpoint key, for the keys that this release of Transformers renames when it loads them."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, rename_source_key
    except ImportError:  # before Transformers 5
        return {}
    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    state = model.state_dict()
    return {rename_source_key(key, renamings, [], model.base_model_prefix, state)[0]: key for key in sorted(keys)}


def _read_safetensors(file: Path, key: str) -> Tensor:
    try:
        with safe_open(file, framework="pt") as shard:
            return shard.get_tensor(key)
    except (OSError, SafetensorError) as error:
        raise SvdtuneError(f"{key} cannot be read from {file} ({error}); download the checkpoint again") from error


def _open_gguf(path: Path) -> Checkpoint:
    """A GGUF file as a Transformers model: names and layout are mapped by Transformers, tensors dequantized by gguf."""
    try:
        from gguf import GGUFReader, dequantize
    except ImportError as error:
        raise SvdtuneError(f"reading {path.name} needs the package gguf: pip install 'svdtune[gguf]'") from error
    from transformers.modeling_gguf_pytorch_utils import (
        TENSOR_PROCESSORS,
        TensorProcessor,
        get_gguf_hf_weights_map,
    )

    with _explain_damage(path):
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
        reader = GGUFReader(path)
        _check_depth(config, len(reader.tensors))
        skeleton = _build(config)
        architecture = bytes(reader.fields["general.architecture"].parts[-1]).decode()
        processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=config.to_dict())
        names = get_gguf_hf_weights_map(skeleton, processor)
        stored = {names[tensor.name]: tensor for tensor in reader.tensors if tensor.name in names}
        matched = list(_match(skeleton, set(stored)))

    def read(tensor) -> Tensor:
        with _explain_damage(path):
            weights = dequantize(tensor.data, tensor.tensor_type)
            processed = processor.process(
                weights=weights, name=tensor.name, tensor_key_mapping=names, parsed_parameters={}
            )
            return torch.from_numpy(processed.weights.copy())

    readers = {name: lambda tensor=stored[key]: read(tensor) for name, key in matched}
    return Checkpoint(str(path), skeleton, readers, path.stat().st_size)


@contextmanager
def _explain_damage(path: Path) -> Iterator[None]:
    """A damaged GGUF file comes out as any of a dozen types of error, struct's and huggingface_hub's among them."""
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error) or isinstance(error, SvdtuneError):
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise SvdtuneError(f"{path} cannot be read as a GGUF model: {reason:.200}; download it again") from error
