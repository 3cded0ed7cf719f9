"""The key-value cache that a pass of a model extends, found by its type.

The name of a forward's argument for it depends on the release of transformers.
"""

from collections.abc import Iterable
from typing import Any

from transformers import DynamicCache, EncoderDecoderCache


def growing_cache(arguments: Iterable[Any]) -> DynamicCache | None:
    """The cache among a forward's arguments that grows by the tokens of each pass; None if there is
    none.

    Of an encoder-decoder model it is the cache of the decoder's self-attention. A static cache is
    left out: it keeps its length on the device, and asking for it would wait for the device.
    """
    for argument in arguments:
        cache = argument.self_attention_cache if isinstance(argument, EncoderDecoderCache) else argument
        if isinstance(cache, DynamicCache):
            return cache
    return None


def is_empty(cache: DynamicCache) -> bool:
    """Whether a cache holds nothing yet, or nothing any more after a reset."""
    try:
        return cache.get_seq_length() == 0
    except ValueError:  # recurrent states alone (Mamba), which have no length
        return not cache.has_previous_state()
