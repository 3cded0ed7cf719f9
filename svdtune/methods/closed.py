"""Where PEFT takes a fixed list of methods, or one method a model: its own refusal, followed by the way round.

PEFT has no hook for this, so the functions that refuse are wrapped when svdtune is imported. What they do stays as it is, for
PEFT's own methods and for ours; only the message of an error that concerns ours is longer.
"""

import functools
from collections.abc import Callable
from typing import Any

from peft import PeftModel
from peft import mixed_model as mixed
from peft.utils import hotswap

from svdtune.errors import SvdtuneError
from svdtune.methods.config import SvdConfig

WAY_ROUND = (
    "Export each adapter to LoRA (`svdtune export ADAPTER --to lora --output FOLDER`), which gives the same outputs, and use "
    "those: PEFT keeps several LoRAs on one model, switches, mixes and swaps them"
)


def explain_refusals() -> None:
    """Wrap the functions of PEFT that refuse. Calling it twice does nothing."""
    _wrap(PeftModel, "add_adapter", _of_two_methods)
    _wrap(mixed, "_check_config_compatible", _ours)
    _wrap(hotswap, "check_hotswap_configs_compatible", _ours)


def _ours(*args: Any) -> bool:
    return any(isinstance(each, SvdConfig) for each in args)


def _of_two_methods(model: PeftModel, adapter_name: str, peft_config: Any, *_: Any, **__: Any) -> bool:
    present = list(model.peft_config.values())
    return _ours(peft_config, *present) and any(each.peft_type != peft_config.peft_type for each in present)


def _wrap(owner: Any, name: str, concerns: Callable[..., bool]) -> None:
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
            raise SvdtuneError(f"{str(error).rstrip('.')}. {WAY_ROUND}") from error

    explained._explained = True
    setattr(owner, name, explained)
