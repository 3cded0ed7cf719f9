"""Load a base model and its tokenizer from a hub name, a local folder, a GGUF file, or the embedded
default."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.hub import cached_file, extract_commit_hash

from svdtune.checkpoint.shards import shard_names
from svdtune.errors import SvdtuneError
from svdtune.methods.files.integrity import ADAPTER_CONFIG
from svdtune.models.end_token import set_end_token
from svdtune.models.smollm2 import SMOLLM2, fetch_smollm2, read_gguf
from svdtune.names import check_hub_name, meant
from svdtune.spectra.devices import check_device
from svdtune.spectra.sharing import has_weights
from svdtune.system import explain_damage, explain_read_error, read_json

_WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "*.safetensors.index.json", "*.bin.index.json")
_HEADS = ("score", "classifier")  # of a sequence classifier
_BOTH = (
    "{} holds a model and an adapter ({}), and Transformers would load both. Give the adapter's files a folder of "
    "their own; train on both by merging them first, for instance with PEFT's merge_and_unload"
)


@dataclass(frozen=True)
class LoadedModel:
    """A base model in evaluation mode, its tokenizer (which always has a padding token), the name
    asked for, and the commit that it is of where it came from the hub."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    commit: str | None = None


def load(
    model: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    attn_implementation: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    chat_template: str | Path | None = None,
    end_token: str | None = None,
    reward: bool = False,
    **model_kwargs: Any,
) -> LoadedModel:
    """Load a causal language model and its tokenizer.

    Args:
        model: a hub name, a local folder, a `.gguf` file (dequantized), or `smollm2-135m`, the
            embedded default.
        dtype: a torch dtype or its name; "auto" is the dtype the weights are stored in.
        device: where to put the model; None leaves it where Transformers did (the CPU without a
            `device_map`).
        attn_implementation: passed to Transformers ("sdpa", "eager", "flash_attention_2", ...).
        revision: the hub revision of both.
        trust_remote_code: allow code from the model's repository to run.
        chat_template: a Jinja file whose text takes the place of the tokenizer's chat template.
        end_token: make this the end token of tokenizer and configs (see
            `svdtune.models.set_end_token`).
        reward: load a sequence classifier with one output instead, a reward model; its head is at
            random where the checkpoint has none.
        **model_kwargs: further arguments for `AutoModelForCausalLM.from_pretrained`, such as
            `quantization_config`.

    Raises:
        SvdtuneError: if there is no such model, its folder lacks weights, or the dtype is unknown.
    """
    name, path = str(model), locate(model)
    loaded: Any  # of Transformers, whose own annotations here are those of wrappers
    dtype = _dtype(dtype)
    commit = commit_at(path, revision)  # one for all parts, even if the hub moves on meanwhile
    shared: dict[str, Any] = {"revision": commit or revision, "trust_remote_code": trust_remote_code}
    if isinstance(path, Path) and path.suffix == ".gguf":
        loaded, tokenizer = read_gguf(path)
        loaded = _with_reward(loaded) if reward else loaded
        loaded = loaded if dtype == "auto" else loaded.to(dtype)
    else:
        tokenizer = load_tokenizer(path, **shared)
        if attn_implementation is not None:
            model_kwargs["attn_implementation"] = attn_implementation
        kind: Any = AutoModelForSequenceClassification if reward else AutoModelForCausalLM
        model_kwargs |= {"num_labels": 1} if reward else {}
        with explain_damage(f"the model {name!r} cannot be loaded"):
            both: Any = kind.from_pretrained(path, dtype=dtype, output_loading_info=True, **shared, **model_kwargs)
            loaded, found = both
        heads = _HEADS if reward else ()
        _check_complete(name, [key for key in found["missing_keys"] if key.partition(".")[0] not in heads])
        if getattr(loaded, "_hf_peft_config_loaded", False):  # of a hub model; a folder is looked at before
            raise SvdtuneError(_BOTH.format(name, ADAPTER_CONFIG))
        if has_weights(loaded):  # elsewhere Transformers 4 leaves whatever was in memory
            _check_numbers(name, loaded)
    if device is not None:
        loaded = loaded.to(device)
    if chat_template is not None:
        tokenizer.chat_template = _read_template(Path(chat_template))
    if end_token is not None:
        set_end_token(loaded, tokenizer, end_token)
    _give_padding(tokenizer)
    return LoadedModel(loaded.eval(), tokenizer, name, commit)


def placement(dtype: str | None, device: str | None) -> dict[str, Any]:
    """Arguments for `load`: what was asked for, and a GPU where there is one and none was named.

    Raises:
        SvdtuneError: there is no such device.
    """
    check_device(device)
    found = device or ("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else None)
    return {key: value for key, value in {"dtype": dtype, "device": found}.items() if value is not None}


def context_length(config: Any) -> int | None:
    """Positions that a model was built for, None where its configuration does not say."""
    found: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    return found


def input_device(model: Any) -> torch.device:
    """Where a model takes its token ids."""
    return model.get_input_embeddings().weight.device


def load_config(model: str | Path, **origin: Any) -> PretrainedConfig:
    """A model's configuration alone.

    Raises:
        SvdtuneError: there is none, or it is damaged.
    """
    with explain_damage(f"the configuration of {str(model)!r} cannot be loaded"):
        found: PretrainedConfig = AutoConfig.from_pretrained(model, **origin)
    return found


def load_decoding(model: str | Path, *, revision: str | None) -> GenerationConfig | None:
    """A model's generation settings alone; None where it has none."""
    try:
        return GenerationConfig.from_pretrained(model, revision=revision or "main")
    except OSError:
        return None


def commit_at(model: str | Path, revision: str | None) -> str | None:
    """The commit of the hub that a revision of a model is; None for a model of this disk, or where
    neither hub nor cache says."""
    if isinstance(model, Path):
        return None
    try:
        return extract_commit_hash(cached_file(model, "config.json", revision=revision), None)
    except OSError:  # which loading it explains
        return None


def load_tokenizer(model: str | Path, **kwargs: Any) -> PreTrainedTokenizerBase:
    """Load a tokenizer alone; it always has a padding token (the end token where it brought none of
    its own).

    Raises:
        SvdtuneError: if there is none.
    """
    path = locate(model)
    if isinstance(path, Path) and path.suffix == ".gguf":
        return read_gguf(path)[1]
    with explain_damage(f"the tokenizer of {str(model)!r} cannot be loaded"):
        tokenizer = AutoTokenizer.from_pretrained(path, **kwargs)
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise SvdtuneError(
            f"the tokenizer of {str(model)!r} knows no words: its files are missing, and Transformers makes an empty one that "
            "drops every text. Save the model's tokenizer beside it with its save_pretrained"
        )
    _give_padding(tokenizer)
    return tokenizer


def locate(model: str | Path) -> str | Path:
    """Return a checked local path, or a hub name as it is; the embedded default is fetched if it
    has to be.

    Raises:
        SvdtuneError: if a path does not exist, or a folder is an adapter or has no config or
            weights.
    """
    if str(model) == SMOLLM2:
        return fetch_smollm2()
    path = Path(model).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        return path
    if path.is_dir():
        _check_folder(path)
        return path.absolute()  # what is trained on it names it, and is used from anywhere
    name = str(model)
    if isinstance(model, Path) or path.suffix == ".gguf" or name.startswith((".", "/", "~")) or name.count("/") > 1:
        where = meant(name, folders=True)
        raise SvdtuneError(f"there is no model at {path}: expected a Transformers folder or a .gguf file{where}")
    check_hub_name(name, "model", "a Transformers folder, a .gguf file or a hub name", [SMOLLM2])
    return name


def _check_complete(name: str, missing: Collection[str]) -> None:
    """Transformers would only warn, and draw the weights that a checkpoint lacks at random."""
    if missing:
        first = sorted(missing)[0]
        raise SvdtuneError(
            f"the model {name!r} lacks {len(missing)} of its weights, {first!r} among them: its files are damaged, or belong "
            "to another configuration. Download it again, or name a causal language model"
        )


def _check_numbers(name: str, model: PreTrainedModel) -> None:
    """Refuse weights that are no numbers: every output would be none, whatever is trained."""
    for where, weight in model.named_parameters():
        # a sum is NaN where one of its terms is, and takes no memory
        suspect = weight.is_floating_point() and weight.element_size() > 1 and not weight.is_meta
        if suspect and weight.detach().sum(dtype=torch.float32).isnan() and weight.isnan().any():
            raise SvdtuneError(
                f"the model {name!r} holds NaN in {where!r}: its files are damaged, or its training diverged. Download it "
                "again, or take another checkpoint"
            )


def _check_folder(path: Path) -> None:
    found = ", ".join(sorted(child.name for child in path.iterdir())[:8]) or "nothing"
    if not (path / "config.json").is_file():
        if (path / ADAPTER_CONFIG).is_file():
            base = read_json(path / ADAPTER_CONFIG).get("base_model_name_or_path")
            raise SvdtuneError(f"{path} is an adapter, not a model; its base model is {base!r}")
        raise SvdtuneError(f"the model folder {path} has no config.json; it holds {found}")
    if (path / ADAPTER_CONFIG).is_file():
        raise SvdtuneError(_BOTH.format(path, ADAPTER_CONFIG))
    if not any(next(path.glob(pattern), None) for pattern in _WEIGHTS):
        raise SvdtuneError(
            f"the model folder {path} has no weights: expected model.safetensors or pytorch_model.bin, found {found}"
        )
    shard_names(path)
    if (decoding := path / "generation_config.json").is_file():
        read_json(decoding)  # Transformers would do without a damaged one, and end texts elsewhere


def _with_reward(model: PreTrainedModel) -> PreTrainedModel:
    """A language model's body with a reward model's head, which is at random."""
    model.config.num_labels = 1
    with torch.device("meta"):
        found: Any = AutoModelForSequenceClassification.from_config(model.config)
    setattr(found, found.base_model_prefix, model.base_model)
    head = next(getattr(found, name) for name in _HEADS if hasattr(found, name))
    head.to_empty(device=model.device)
    torch.nn.init.normal_(head.weight, std=getattr(model.config, "initializer_range", 0.02))
    return found.to(model.dtype)


def _dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    if isinstance(dtype, torch.dtype) or dtype == "auto":
        return dtype
    found = getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise SvdtuneError(f"dtype {dtype!r} is none: expected auto, float32, bfloat16 or float16")
    return found


def _give_padding(tokenizer: PreTrainedTokenizerBase) -> None:
    """Padding is masked by position, never by token id, so that the end token can serve as
    padding."""
    if tokenizer.pad_token_id is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token


def _read_template(path: Path) -> str:
    try:
        return path.expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = explain_read_error(error) if isinstance(error, OSError) else "it is not UTF-8"
        raise SvdtuneError(
            f"model.chat_template: cannot read {path}: {reason}; expected a Jinja file, such as chat_template.jinja"
        ) from error
