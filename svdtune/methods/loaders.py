"""What svdtune wraps in other libraries, which have no hooks for it: the loaders of Transformers
fill an adapter through `load_state_dict`, as PEFT does, and PEFT saves no pickle.

`model.load_adapter(folder)`, `AutoModelFor….from_pretrained(adapter_folder)` and
`pipeline(model=adapter_folder)` end in one function of Transformers. From release 5 it finds
parameters by names that begin with the method's. It passes over frozen factors and their probes,
and makes no check. So if an adapter of svdtune's waits for its values, that function gets none, and
the file is loaded as all such adapters are. The loaders also read configurations through
`PeftConfig`, which skips the checks of the files. PEFT's `save_pretrained` would write a pickle if
`safe_serialization=False`, which svdtune never loads: it is refused before anything is written.
"""

import functools
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

from peft import PeftConfig, PeftModel, PeftType
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from svdtune.errors import SvdtuneError
from svdtune.methods.config import SvdConfig
from svdtune.methods.files.integrity import ADAPTER_WEIGHTS, PEFT_ROOT, check_weights_file
from svdtune.methods.layers.base import SvdLayer

_FILLS = "_load_pretrained_model"


def fill_through_peft() -> None:
    """Wrap the function of Transformers 5 that fills parameters. Transformers 4 fills adapters
    through PEFT by itself."""
    original = getattr(PreTrainedModel, _FILLS)
    if find_spec("transformers.core_model_loading") is None:  # of release 4
        return

    @functools.wraps(original)
    def fill(
        model: nn.Module,
        state_dict: dict[str, Tensor] | None,
        checkpoint_files: list[str] | None,
        load_config: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        adapter = _awaited(model)
        if adapter is None:
            return original(model, state_dict, checkpoint_files, load_config, *args, **kwargs)
        name, config = adapter
        _fill(model, name, config, state_dict, checkpoint_files)
        found = original(model, {}, None, load_config, *args, **kwargs)
        report = found[0] if isinstance(found, tuple) else found
        for keys in (report.missing_keys, report.unexpected_keys, report.mismatched_keys):
            keys.clear()
        return found

    setattr(PreTrainedModel, _FILLS, staticmethod(fill))


def read_as_ours() -> None:
    """Make `PeftConfig.from_pretrained` check a configuration of svdtune's as its own class
    does."""
    original: Any = PeftConfig.from_pretrained

    @functools.wraps(original.__func__)
    def from_pretrained(cls: type[PeftConfig], *args: Any, **kwargs: Any) -> PeftConfig:
        if issubclass(cls, SvdConfig):
            return original.__func__(cls, *args, **kwargs)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            config = original.__func__(cls, *args, **kwargs)
        if isinstance(config, SvdConfig):
            return type(config).from_pretrained(*args, **kwargs)
        for warning in caught:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
        return config

    type.__setattr__(PeftConfig, "from_pretrained", classmethod(from_pretrained))


def refuse_pickles() -> None:
    """Make PEFT's `save_pretrained` refuse to write an adapter of svdtune's as a pickle."""
    original = PeftModel.save_pretrained

    @functools.wraps(original)
    def save_pretrained(
        self: PeftModel, save_directory: str, safe_serialization: bool = True, *args: Any, **kwargs: Any
    ) -> Any:
        if not safe_serialization and any(isinstance(config, SvdConfig) for config in self.peft_config.values()):
            raise SvdtuneError(
                "safe_serialization=False writes a pickle, which svdtune never loads, since it can run code; leave it out, and "
                "the adapter is saved as safetensors"
            )
        return original(self, save_directory, safe_serialization, *args, **kwargs)

    type.__setattr__(PeftModel, "save_pretrained", save_pretrained)


def _awaited(model: nn.Module) -> tuple[str, SvdConfig] | None:
    """The adapter that was put on last, if it is one of svdtune's and waits for its values."""
    configs: dict[str, PeftConfig] = getattr(model, "peft_config", {})
    name = next(reversed(configs), "")
    config = configs.get(name)
    if not isinstance(config, SvdConfig):
        return None
    waits = any(isinstance(layer, SvdLayer) and layer.awaits(name) for layer in model.modules())
    return (name, config) if waits else None


def _fill(
    model: nn.Module, name: str, config: SvdConfig, tensors: dict[str, Tensor] | None, files: list[str] | None
) -> None:
    if tensors is None:
        folder = Path(files[0]).parent if files else Path()
        try:
            check_weights_file(folder, config.weights_sha256)  # downloaded ones too
        except SvdtuneError:
            cast(Any, PEFT_TYPE_TO_TUNER_MAPPING[PeftType(config.peft_type)])._take_back(model, name)
            raise
        tensors = load_file(folder / ADAPTER_WEIGHTS)
    tensors = {key.removeprefix(PEFT_ROOT): tensor for key, tensor in tensors.items()}
    set_peft_model_state_dict(model, tensors, name)
