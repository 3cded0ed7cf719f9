"""PEFT's and transformers' own refusals of svdtune's methods, each followed by the way round.

PEFT takes a fixed list of methods in some places, and one method a model in others. Transformers
takes certain versions of PEFT. Neither has a hook for this, so the functions that refuse are
wrapped when svdtune is imported. They do what they did, for PEFT's methods and svdtune's; only the
message of an error about svdtune's methods is longer.
"""

import functools
from collections.abc import Callable
from typing import Any

from peft import PeftModel
from peft import mixed_model as mixed
from peft.utils import hotswap
from transformers import PreTrainedModel

from svdtune.errors import SvdtuneError
from svdtune.methods.config import SvdConfig

WAY_ROUND = (
    "Export each adapter to LoRA (`svdtune export ADAPTER --to lora --output FOLDER`), which gives the same outputs, and use "
    "those: PEFT keeps several LoRAs on one model, switches, mixes and swaps them"
)

NOT_BY_TRANSFORMERS = (
    "This is transformers' own `add_adapter`. `peft.get_peft_model(model, config)` adds the same adapter with the PEFT that is "
    "installed, and `peft.PeftModel.from_pretrained(model, folder)` loads one; or install an older transformers"
)


def explain_refusals() -> None:
    """Wrap the functions of PEFT and transformers that refuse. Calling it twice does nothing."""
    _wrap(PeftModel, "add_adapter", _of_two_methods, WAY_ROUND)
    _wrap(mixed, "_check_config_compatible", _ours, WAY_ROUND)
    _wrap(hotswap, "check_hotswap_configs_compatible", _ours, WAY_ROUND)
    _wrap(PreTrainedModel, "add_adapter", _of_this_peft, NOT_BY_TRANSFORMERS)
    _refuse_pickles()


def _refuse_pickles() -> None:
    original = PeftModel.save_pretrained
    if hasattr(original, "_explained"):
        return

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

    vars(save_pretrained)["_explained"] = True
    type.__setattr__(PeftModel, "save_pretrained", save_pretrained)


def refused_peft() -> str | None:
    """Why transformers refuses the installed PEFT in its own `add_adapter` and the like; None if it
    does not."""
    # of its insides, so asked after a refusal alone
    from transformers.integrations.peft import MIN_PEFT_VERSION
    from transformers.utils.peft_utils import check_peft_version

    try:
        check_peft_version(MIN_PEFT_VERSION)
    except ValueError as error:
        return str(error)
    return None


def _ours(*args: Any) -> bool:
    return any(isinstance(each, SvdConfig) for each in args)


def _of_two_methods(model: PeftModel, adapter_name: str, peft_config: Any, *_: Any, **__: Any) -> bool:
    present = list(model.peft_config.values())
    return _ours(peft_config, *present) and any(each.peft_type != peft_config.peft_type for each in present)


def _of_this_peft(model: PreTrainedModel, adapter_config: Any, *_: Any, **__: Any) -> bool:
    return _ours(adapter_config) and refused_peft() is not None


def _wrap(owner: Any, name: str, concerns: Callable[..., bool], way_round: str) -> None:
    original = getattr(owner, name, None)
    if original is None or hasattr(original, "_explained"):
        return

    @functools.wraps(original)
    def explained(*args: Any, **kwargs: Any) -> Any:
        try:
            return original(*args, **kwargs)
        except SvdtuneError:
            raise
        except ValueError as error:
            if not concerns(*args, **kwargs):
                raise
            raise SvdtuneError(f"{str(error).rstrip('.')}. {way_round}") from error

    vars(explained)["_explained"] = True
    setattr(owner, name, explained)
