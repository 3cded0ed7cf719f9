"""PEFT's `save_pretrained(safe_serialization=False)` would write a pickle, which svdtune never
loads. It is refused before anything is written; PEFT has no hook for this."""

import functools
from typing import Any

from peft import PeftModel

from svdtune.errors import SvdtuneError
from svdtune.methods.config import SvdConfig


def refuse_pickles() -> None:
    """Wrap PEFT's function. Calling it twice does nothing."""
    original = PeftModel.save_pretrained
    if hasattr(original, "_without_pickles"):
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

    vars(save_pretrained)["_without_pickles"] = True
    type.__setattr__(PeftModel, "save_pretrained", save_pretrained)
