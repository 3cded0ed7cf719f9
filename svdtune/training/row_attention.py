"""Attention over rows that lie one after another in one sequence, each by itself.

PyTorch's kernel for rows of different lengths is told where rows begin. It computes nothing between
two rows and needs no mask, where a mask costs as much as if all rows were one.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from svdtune.errors import SvdtuneError

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:
    _KERNEL: Any = None
else:
    _known = {"window_size", "scale"} <= set(inspect.signature(varlen_attn).parameters)
    _KERNEL = varlen_attn if _known else None

NAME = "svdtune_rows"  # of an attention, as Transformers keeps them
# What this attention does not do. Transformers hands it over where a model has it.
_BEYOND = ("sliding_window", "softcap", "s_aux", "position_bias")


@contextmanager
def attention_by_rows(model: Any) -> Iterator[None]:
    """Have a model that uses SDPA attend by rows, until the block ends.

    Args:
        model: of Transformers, with or without an adapter. `cu_seq_lens_q` and `max_length_q` tell
            where rows begin, as `PackingCollator` gives them with `flat`; inputs without them are
            attended to as before.
    """
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _mask)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    before = base.config._attn_implementation
    base.set_attn_implementation(NAME)
    try:
        yield
    finally:
        base.set_attn_implementation(before)


def kernel_fits(model: Any, autocast: torch.dtype | None) -> bool:
    """Whether PyTorch's kernel can serve a model here: on an NVIDIA GPU of compute capability 8.0
    or more, in 16 bits, for SDPA without dropout. `keeps_rows_apart` tells whether it is right.

    Args:
        model: on its device.
        autocast: the dtype that training computes in, or None for that of the weights.
    """
    weight = model.get_input_embeddings().weight
    config = model.config.get_text_config()
    dropout = any(value for name, value in config.to_dict().items() if "drop" in name and "att" in name)
    return (
        getattr(config, "_attn_implementation", None) == "sdpa"
        and not dropout
        and weight.is_cuda
        and torch.version.hip is None
        and torch.cuda.get_device_capability(weight.device) >= (8, 0)
        and (autocast or weight.dtype) in (torch.bfloat16, torch.float16)
        and _KERNEL is not None
    )


def attend(query: Tensor, key: Tensor, value: Tensor, starts: Tensor, longest: int, scale: float | None) -> Tensor:
    """Causal attention within each row.

    Args:
        query: [tokens, heads, width], all rows one after another.
        key: [tokens, key heads, width]; heads is a multiple of key heads.
        value: as `key`.
        starts: int32 [rows + 1], where each row begins, and the number of tokens.
        longest: the number of tokens of the longest row, or more.
        scale: of the products; 1/√width by default.

    Returns: as `query`.
    """
    if _KERNEL is None or not query.is_cuda or query.dtype not in (torch.bfloat16, torch.float16):
        return attend_in_turn(query, key, value, starts, scale)
    key, value = (_for_heads(x, query.shape[1]) for x in (key, value))
    found: Tensor = _KERNEL(query, key, value, starts, starts, longest, longest, scale=scale, window_size=(-1, 0))
    return found


def attend_in_turn(query: Tensor, key: Tensor, value: Tensor, starts: Tensor, scale: float | None) -> Tensor:
    """What `attend` computes, row after row: its reference, and what it does without the kernel."""
    bounds = starts.tolist()
    key, value = (_for_heads(x, query.shape[1]) for x in (key, value))
    rows = []
    for start, end in pairwise(bounds):
        q, k, v = (x[start:end].transpose(0, 1) for x in (query, key, value))
        rows.append(scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale).transpose(0, 1))
    return torch.cat(rows)


def _for_heads(x: Tensor, heads: int) -> Tensor:
    """Keys or values [tokens, key heads, width], repeated for every head that reads them."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention of Transformers: query [1, heads, tokens, width] → [1, tokens, heads, width]."""
    if cu_seq_lens_q is None or max_length_q is None:
        found: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
        return found
    if beyond := [name for name in _BEYOND if kwargs.get(name) is not None]:
        raise SvdtuneError(
            f"{type(module).__name__} attends with {', '.join(beyond)}, which attention by rows does not know; set "
            "training.padding_free: false"
        )
    if torch.is_autocast_enabled(query.device.type):
        query, key, value = (x.to(torch.get_autocast_dtype(query.device.type)) for x in (query, key, value))
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    return attend(q, k, v, cu_seq_lens_q, max_length_q, scaling)[None], None


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """SDPA's mask, but none for whole sequences that come without one: where rows begin is told
    otherwise."""
    whole = kwargs.get("q_length", kwargs.get("cache_position"))
    queries = whole if isinstance(whole, int) else None if whole is None else len(whole)
    if kwargs.get("attention_mask") is None and queries == kwargs["kv_length"]:
        return None
    found: Tensor | None = sdpa_mask(*args, **kwargs)
    return found
