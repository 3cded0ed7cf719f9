"""Open what a command is given: a training run, an adapter folder, or a plain model with or without
an adapter."""

import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from transformers import PreTrainedModel

from svdtune.checkpoint import Checkpoint, open_checkpoint
from svdtune.checkpoint.shards import shard_names
from svdtune.checkpoint.tensors import read_shard
from svdtune.errors import SvdtuneError
from svdtune.methods.files.adapter import architecture_of, read_config, read_settings
from svdtune.methods.files.integrity import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from svdtune.models import SMOLLM2, LoadedModel, load
from svdtune.models.loader import locate
from svdtune.names import meant
from svdtune.starts.pairs import check_repeated
from svdtune.training.folder import ADAPTER, FULL_MODEL, RECIPE, SUMMARY, read_run
from svdtune.training.recipe import Recipe


@dataclass(frozen=True)
class Source:
    """A base model, and the adapter to put on it.

    Attributes:
        base: What `svdtune.models.load` takes: hub name, folder, or the embedded default's name.
        adapter: Folder of a saved PEFT adapter, None for the base alone.
        run: Folder of the training run both come from, None where they were named directly.
        recipe: That run's recipe; its model section says how the base is loaded.
        revision: The commit of a hub model that the adapter was made on, where it says so.
    """

    base: str
    adapter: Path | None = None
    run: Path | None = None
    recipe: Recipe | None = None
    revision: str | None = None

    @property
    def origin(self) -> dict[str, Any]:
        """What goes with the base's name wherever a part of it is opened: its revision on the hub,
        and whether its code may run."""
        own = self.recipe is not None and self.recipe.model.name == self.base
        asked = self.recipe.model.revision if self.recipe is not None and own else None
        return {"revision": self.revision or asked, "trust_remote_code": self.trust_remote_code}

    @property
    def trust_remote_code(self) -> bool:
        """Whether the run was allowed to run code from the model's repository."""
        return self.recipe is not None and self.recipe.model.trust_remote_code


def find_source(given: str | Path, adapter: str | Path | None = None) -> Source:
    """Work out what `given` is, reading small files only.

    Args:
        given: A run folder (`recipe.yaml`, `adapter/`), an adapter folder, a model folder, or a hub
            name.
        adapter: An adapter folder to put on `given`, which then must be a model.

    Raises:
        SvdtuneError: If a path does not exist, a run is not finished, or two adapters are named.
    """
    folder = Path(given).expanduser()
    if adapter is not None:
        adapter = Path(adapter).expanduser()
        read_settings(adapter)
        if _is_run(folder) or _is_adapter(folder):
            raise SvdtuneError(f"{given} brings its own adapter; with --adapter, name the base model instead")
        return Source(str(given), adapter)
    if _is_run(folder):
        return _source_of_run(folder)
    if not _is_adapter(folder):
        return Source(str(given))
    settings = read_settings(folder)
    base = settings.get("base_model_name_or_path")
    if not base:
        raise SvdtuneError(f"{folder / ADAPTER_CONFIG} does not name its base model; use BASE --adapter {folder}")
    return Source(base, folder, revision=settings.get("revision"))


def open_source(source: Source, **load_kwargs: Any) -> LoadedModel:
    """Load the base model with its tokenizer, and put the adapter on it, ready for inference.

    Args:
        source: What to open.
        **load_kwargs: Passed to `svdtune.models.load` (dtype, device, ...); they go before the
            recipe's.

    Raises:
        SvdtuneError: If a part is missing or the adapter was made for another model; if it is a
            reward model's and `reward=True` does not ask for one.
    """
    if not load_kwargs.get("reward"):
        check_writes(source)
    how = source.recipe.model.model_dump(exclude={"name"}) if source.recipe else {}
    loaded = load(source.base, **how | source.origin | load_kwargs)
    if source.adapter is None:
        return replace(loaded, name=str(source.run or source.base))
    model = attach_adapter(loaded.model, source.adapter)
    # a PeftModel answers for its base model
    return replace(loaded, model=cast(PreTrainedModel, model), name=str(source.run or source.adapter))


def is_reward(source: Source) -> bool:
    """Whether it gives one number for a text instead of writing on."""
    if source.adapter is not None:
        return read_settings(source.adapter).get("task_type") == "SEQ_CLS"
    return source.recipe is not None and source.recipe.training.task == "reward"


def check_writes(source: Source) -> None:
    """Refuse a reward model where text is to be written.

    Raises:
        SvdtuneError: it is one.
    """
    if is_reward(source):
        raise SvdtuneError(
            f"{source.run or source.adapter} is a reward model: it gives a number for a text and writes none. Load its base "
            "with AutoModelForSequenceClassification (num_labels=1) and the adapter with PeftModel"
        )


def base_folder(source: Source) -> Path:
    """Where the base lies on this disk: its folder or GGUF file, fetched from the hub if it has to
    be.

    Raises:
        SvdtuneError: it does not exist, or cannot be fetched.
    """
    found = locate(source.base)
    if isinstance(found, Path):
        return found
    # Weights in other formats than safetensors are left where they are.
    kinds = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.py", "LICENSE*", "NOTICE*"]
    try:
        return Path(snapshot_download(found, revision=source.origin["revision"], allow_patterns=kinds))
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise SvdtuneError(f"the model {found!r} cannot be fetched: {_shortened(error)}") from error


@contextmanager
def opened_base(source: Source, adapter: PeftConfig, beside: Path | None = None) -> Iterator[Checkpoint]:
    """The base as safetensors: its own folder, or for a GGUF file or pickled weights a conversion
    that is removed again."""
    folder = base_folder(source)
    how: dict[str, Any] = {"architecture": architecture_of(adapter), "trust_remote_code": source.trust_remote_code}
    if folder.is_dir() and shard_names(folder) is not None:
        yield open_checkpoint(folder, **how)
        return
    with tempfile.TemporaryDirectory(dir=beside, prefix=".svdtune-base-") as converted:
        loaded = load(folder, trust_remote_code=source.trust_remote_code)
        loaded.model.save_pretrained(converted)
        loaded.tokenizer.save_pretrained(converted)
        del loaded
        yield open_checkpoint(converted, **how)


def attach_adapter(model: torch.nn.Module, adapter: Path) -> PeftModel:
    """Load an adapter onto its base model and make sure that every one of its weights found its
    place.

    PEFT only warns about weights that are missing and is silent about weights left over, so an
    adapter of a model with more or fewer layers would half load.

    Raises:
        SvdtuneError: If the files are missing or damaged, or the adapter does not fit this model.
    """
    check_repeated(adapter, read_config(adapter))
    stored = _stored_keys(adapter)
    device = next(model.parameters()).device
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Found missing adapter keys")  # an error below
            # PEFT says so of every AdaLoRA that has given up ranks, and loads it as it was saved
            warnings.filterwarnings("ignore", r"The following rank_pattern keys did not match .*\.lora_E'")
            adapted = PeftModel.from_pretrained(model, adapter, torch_device=str(device))
    except SvdtuneError:
        raise
    except (ValueError, RuntimeError, KeyError, TypeError) as error:
        raise SvdtuneError(f"the adapter {adapter} does not fit this model: {_shortened(error)}") from error
    expected = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
    lacking, left_over = sorted(expected - stored), sorted(stored - expected - set(adapted.state_dict()))
    if lacking or left_over:
        first = f"the file lacks {lacking[0]}" if lacking else f"the model has no place for {left_over[0]}"
        raise SvdtuneError(
            f"the adapter {adapter} does not fit this model: {len(lacking) + len(left_over)} weights do not match "
            f"({first}); it was made for another model"
        )
    return adapted.eval()


def adapter_of(source: Source, task: str) -> Path:
    """The adapter of what a command was given.

    Raises:
        SvdtuneError: there is none.
    """
    if source.adapter is not None:
        return source.adapter
    if source.base != SMOLLM2 and not Path(source.base).expanduser().exists():
        where = meant(source.base, folders=True)
        raise SvdtuneError(f"there is no run or adapter folder {source.base}, so there is nothing to {task}{where}")
    raise SvdtuneError(f"{source.base} has no adapter, so there is nothing to {task}; name a run or an adapter folder")


def adapter_folder(given: str | Path, task: str) -> Path:
    """The adapter of a run, or of an adapter folder, whose base model need not be known.

    Raises:
        SvdtuneError: there is none.
    """
    folder = Path(given).expanduser()
    return folder if _is_adapter(folder) else adapter_of(find_source(given), task)


def _is_run(folder: Path) -> bool:
    return (folder / RECIPE).is_file()


def _is_adapter(folder: Path) -> bool:
    return (folder / ADAPTER_CONFIG).is_file()


def _source_of_run(run: Path) -> Source:
    if not (run / SUMMARY).is_file():
        raise SvdtuneError(f"the run {run} is not finished; finish it with `svdtune train RECIPE --resume`")
    recipe = read_run(run)
    if (run / FULL_MODEL).is_dir():
        return Source(str(run / FULL_MODEL), None, run, recipe)
    commit = read_settings(run / ADAPTER).get("revision")
    return Source(recipe.model.name, run / ADAPTER, run, recipe, commit)


def _stored_keys(adapter: Path) -> set[str]:
    if not (adapter / ADAPTER_WEIGHTS).is_file():
        raise SvdtuneError(f"the adapter {adapter} has no {ADAPTER_WEIGHTS}; save it again with save_pretrained")
    return set(read_shard(adapter, ADAPTER_WEIGHTS).tensors)


def _shortened(error: BaseException) -> str:
    """The start of an error that may list every layer of a model."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[:2])[:300]
