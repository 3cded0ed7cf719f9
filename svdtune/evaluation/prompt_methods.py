"""Generation with PEFT's prompt methods (prefix, prompt and P-tuning) where transformers is ahead
of PEFT."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft import PeftModel
from torch import nn
from transformers.cache_utils import Cache

PEFTS_NAME = "past_key_values"


def is_prompted(model: nn.Module) -> bool:
    """Whether the model's adapter is one of PEFT's prompt methods, whose cache begins with what is
    no token."""
    return isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning


def refused_peft() -> str | None:
    """Why transformers refuses the installed PEFT in its own `add_adapter` and the like; None if it
    does not."""
    from transformers.integrations.peft import MIN_PEFT_VERSION
    from transformers.utils.peft_utils import check_peft_version

    try:
        check_peft_version(MIN_PEFT_VERSION)
    except ValueError as error:
        return str(error)
    return None


@contextmanager
def cache_where_peft_looks(model: Any) -> Iterator[None]:
    """While it lasts, a prompt method's `generate` hands PEFT the cache under the name that PEFT
    knows.

    transformers 5.24 calls it `cache`. PEFT 0.21, which transformers therefore refuses, takes it to
    be missing: it gives a new prompt at every token, and transformers ignores a prefix beside its
    own cache, so that the model generates as if it were not trained. Nothing is done with a PEFT
    that transformers takes, nor with any other method.
    """
    if not is_prompted(model) or refused_peft() is None:
        yield
        return
    prepare = model.base_model_prepare_inputs_for_generation

    def renamed(*args: Any, **kwargs: Any) -> dict[str, Any]:
        inputs = prepare(*args, **kwargs)
        return {PEFTS_NAME if isinstance(value, Cache) else name: value for name, value in inputs.items()}

    model.base_model_prepare_inputs_for_generation = renamed
    try:
        yield
    finally:
        model.base_model_prepare_inputs_for_generation = prepare
