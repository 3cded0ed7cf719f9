"""Slices of fused projections: which rows of one weight are q, k, v, gate or up, by model type.

A fused weight [out, in] is seen as `groups` blocks of `width` rows, and a slice takes rows `start`
to `stop` of every block. One block: the slices lie one after the other (GPT-2, Phi-3). One block a
head, or a key-value head: they are interleaved (GPT-NeoX, BLOOM, Falcon).
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import astuple, dataclass
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from svdtune.errors import SvdtuneError
from svdtune.names import is_named


@dataclass(frozen=True)
class Rows:
    """Rows `start` to `stop` in each of `groups` blocks of `width` rows."""

    groups: int
    width: int
    start: int
    stop: int

    @property
    def count(self) -> int:
        """The number of rows."""
        return self.groups * (self.stop - self.start)

    def of(self, tensor: Tensor, dim: int) -> Tensor:
        """A view of these rows along `dim`. It has two dimensions there: blocks, and rows in a
        block."""
        return tensor.unflatten(dim, (self.groups, self.width)).narrow(dim if dim < 0 else dim + 1, *self._span)

    def matrix(self, weight: Tensor) -> Tensor:
        """These rows of a matrix [out, in]: [count, in], a view where they lie together."""
        return self.of(weight, 0).flatten(0, 1)

    def apart(self, tensor: Tensor, dim: int) -> Tensor:
        """A tensor with `count` entries along `dim`, in the form that `of` gives."""
        return tensor.unflatten(dim, (self.groups, self.stop - self.start))

    @property
    def _span(self) -> tuple[int, int]:
        return self.start, self.stop - self.start

    def as_list(self) -> list[int]:
        """[groups, width, start, stop], as a configuration records it."""
        return list(astuple(self))


Parts = dict[str, Rows]


def in_a_row(groups: int, **sizes: int) -> Parts:
    """Slices one after the other in each of `groups` blocks, given their rows in a block."""
    ends = [0]
    for size in sizes.values():
        ends.append(ends[-1] + size)
    spans = zip(sizes, pairwise(ends), strict=True)
    return {name: Rows(groups, ends[-1], start, stop) for name, (start, stop) in spans}


def _thirds(config: Any) -> Parts:
    return in_a_row(1, q=config.hidden_size, k=config.hidden_size, v=config.hidden_size)


def _by_head(config: Any) -> Parts:
    size = config.hidden_size // config.num_attention_heads
    return in_a_row(config.num_attention_heads, q=size, k=size, v=size)


def _phi3(config: Any) -> Parts:
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    keys = config.num_key_value_heads * size
    return in_a_row(1, q=config.num_attention_heads * size, k=keys, v=keys)


def _gate_up(config: Any) -> Parts:
    return in_a_row(1, gate=config.intermediate_size, up=config.intermediate_size)


def _falcon(config: Any) -> Parts:
    heads, size = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    if (
        config.new_decoder_architecture
    ):  # Falcon 40B, 180B and Falcon 2: the queries of a key-value head, then its k and v
        return in_a_row(config.num_kv_heads, q=heads // config.num_kv_heads * size, k=size, v=size)
    if config.multi_query:  # 7B: all queries, then the only k and v
        return in_a_row(1, q=heads * size, k=size, v=size)
    return _by_head(config)  # the RefinedWeb models


# model type → name of the fused module → its slices
KNOWN: dict[str, dict[str, Callable[[Any], Parts]]] = {
    "gpt2": {"c_attn": _thirds},
    "phi3": {"qkv_proj": _phi3, "gate_up_proj": _gate_up},
    "gpt_neox": {"query_key_value": _by_head},
    "bloom": {"query_key_value": _by_head},
    "falcon": {"query_key_value": _falcon},
    "mpt": {"Wqkv": _thirds},
}


def known_parts(model: nn.Module, name: str) -> Parts | None:
    """The slices of a module; None if none are known for it.

    The configuration nearest above the module decides, so a language model inside another model is
    found too.
    """
    last = name.rpartition(".")[2]
    for config in _configs_above(model, name):
        find = KNOWN.get(getattr(config, "model_type", ""), {}).get(last)
        if find is not None:
            return find(config)
    return None


def _configs_above(model: nn.Module, name: str) -> Iterator[Any]:
    path = [model]
    for part in name.split(".")[:-1]:
        path.append(getattr(path[-1], part))
    yield from (module.config for module in reversed(path) if hasattr(module, "config"))


def chosen_parts(
    asked: Mapping[str, Any] | str | None, usual: tuple[str, ...] | None, model: nn.Module, name: str, out: int
) -> Parts:
    """The slices of a module that a configuration asks for; {} if the module is adapted as a whole.

    Args:
        asked: `fused_slices` of the configuration.
        usual: the slices that "auto" takes of those known, None for all of them.
        model: holds the module.
        name: of the module.
        out: rows of its weight.

    Raises:
        SvdtuneError: a slice that is not known, or that does not lie in the weight.
    """
    if asked is None:
        return {}
    if isinstance(asked, str):  # "auto"
        known = known_parts(model, name) or {}
        parts = {part: rows for part, rows in known.items() if usual is None or part in usual} or known
    else:
        wanted = next((value for key, value in asked.items() if is_named(name, key)), None)
        if wanted is None:
            return {}
        parts = _named_parts(wanted, model, name)
    check_rows(name, parts, out)
    return parts


def check_rows(name: str, parts: Parts, out: int) -> None:
    """Raise `SvdtuneError` for a slice that does not lie in a weight of `out` rows."""
    for part, rows in parts.items():
        if rows.groups * rows.width != out or not 0 <= rows.start < rows.stop <= rows.width:
            raise SvdtuneError(
                f"slice {part!r} of {name!r} is rows {rows.start} to {rows.stop} in each of {rows.groups} blocks of "
                f"{rows.width} rows, but the weight has {out} rows. Leave the module out of `fused_slices`, or give the "
                "slices that it has as {part: [groups, width, start, stop]}"
            )


def _named_parts(wanted: Any, model: nn.Module, name: str) -> Parts:
    if isinstance(wanted, Mapping):
        return {part: Rows(*numbers) for part, numbers in wanted.items()}
    known = known_parts(model, name)
    if known is None:
        raise SvdtuneError(
            f"fused_slices asks for slices of {name!r}, but how its weight is made up is not known for this model. Give them "
            "as {part: [groups, width, start, stop]}: rows start to stop in each of `groups` blocks of `width` rows"
        )
    if unknown := [part for part in wanted if part not in known]:
        raise SvdtuneError(f"{name!r} has no slice {unknown[0]!r}; it has {', '.join(known)}")
    return {part: known[part] for part in known if part in wanted}
