"""The key-value cache that a pass of a model extends, found by what it is: what its argument is called depends on the release."""

from collections.abc import Iterable
from typing import Any

from transformers import DynamicCache, EncoderDecoderCache


def growing_cache(arguments: Iterable[Any]) -> DynamicCache | None:
    """The cache among the arguments of a model's forward that grows by the tokens of each pass; None where there is none.

    An encoder-decoder model's is the one of its decoder's self-attention. A static cache is none: it keeps its length on the
    device, where to ask for it would be to wait.
    """
    for argument in arguments:
        cache = argument.self_attention_cache if isinstance(argument, EncoderDecoderCache) else argument
        if isinstance(cache, DynamicCache):
            return cache
    return None


def is_empty(cache: DynamicCache) -> bool:
    """Whether a cache holds nothing yet, or nothing any more after its reset."""
    try:
        return cache.get_seq_length() == 0
    except ValueError:  # recurrent states alone (Mamba), which have no length
        return not cache.has_previous_state()
